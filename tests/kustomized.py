"""What `kubectl apply -k` sends, of a folder with a kustomization.yaml, without kubectl: as much of
Kustomize as ours uses. test_kubernetes.py compares it with kubectl's own, where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
LOCAL = "config.kubernetes.io/local-config"


def manifests(folder: Path, site: Mapping[str, str] | None = None) -> list[Manifest]:
    """site: what a site gives other values than ours, by the names in `configMapGenerator`."""
    asked = yaml.safe_load((folder / "kustomization.yaml").read_text())
    made = [_config_map(each, site or {}) for each in asked["configMapGenerator"]]
    for file in asked["resources"]:
        made += yaml.safe_load_all((folder / file).read_text())
    images = {each["name"]: f"{each['newName']}:{each['newTag']}" for each in asked["images"]}
    for manifest in made:
        manifest["metadata"]["namespace"] = asked["namespace"]
        for container in _containers(manifest):
            container["image"] = images[container["image"]]
    for each in asked["replacements"]:
        source = each["source"]
        (value,) = (
            next(_places(manifest, source["fieldPath"]))
            for manifest in made
            if (manifest["kind"], manifest["metadata"]["name"]) == (source["kind"], source["name"])
        )
        for target in each["targets"]:
            for manifest in made:
                if manifest["kind"] == target["select"]["kind"]:
                    _replace(manifest, target, value[0][value[1]])
    return [each for each in made if LOCAL not in each["metadata"].get("annotations", {})]


def _config_map(asked: Manifest, site: Mapping[str, str]) -> Manifest:
    given = dict(each.split("=", 1) for each in asked["literals"])
    data = given | {name: site[name] for name in given.keys() & site.keys()}
    metadata = {"name": asked["name"]}
    if annotations := asked["options"].get("annotations"):
        metadata["annotations"] = annotations
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _containers(node: Any) -> Iterator[Manifest]:
    if isinstance(node, list):
        for each in node:
            yield from _containers(each)
    elif isinstance(node, dict):
        yield from node.get("containers", [])
        for each in node.values():
            yield from _containers(each)


def _replace(manifest: Manifest, target: Manifest, value: str) -> None:
    """Write a value into the fields that a target names, as the type that each has."""
    options = target.get("options")
    for path in target["fieldPaths"]:
        places = list(_places(manifest, path))
        assert places, f"{manifest['kind']} has no {path}"
        for parent, key in places:
            new = value
            if options:
                parts = parent[key].split(options["delimiter"])
                parts[options["index"]] = value
                new = options["delimiter"].join(parts)
            parent[key] = type(parent[key])(new)


def _places(node: Any, path: str) -> Iterator[tuple[Any, Any]]:
    """The parents and keys of the fields at a path such as `a.b.[name=c].*.0.d`."""
    step, _, rest = path.partition(".")
    if step == "*":
        found = list(range(len(node)))
    elif step.startswith("["):
        name, _, wanted = step[1:-1].partition("=")
        found = [number for number, each in enumerate(node) if each[name] == wanted]
    else:
        key = int(step) if isinstance(node, list) else step
        found = [key] if isinstance(node, list) or key in node else []
    for key in found:
        if rest:
            yield from _places(node[key], rest)
        else:
            yield node, key
