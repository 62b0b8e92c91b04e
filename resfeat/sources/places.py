"""What a source stands for: a glob for what matches it, a folder of containers for these.

A container is a file that holds many images. This works for every kind that is in `CONTAINERS`, on
a disk and in a store.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from resfeat.errors import UsageError
from resfeat.sources import directory, prefix, rules
from resfeat.sources.formats import COLUMNAR, TABLES
from resfeat.sources.outputs import MARK
from resfeat.storage import is_remote, locate

# By extension. Where a folder has several kinds, the others describe the first: beside its tars,
# img2dataset writes what it knows of them as Parquet.
CONTAINERS = {"tar": (".tar", ".tar.gz", ".tgz"), "table": COLUMNAR}
# These are containers only where they are named: in a folder they may be anything.
NAMED = {"table": TABLES}
# What `datasets` writes beside the files that it saves: their names, and the names of its splits.
SAVED, SPLITS = "state.json", "dataset_dict.json"
# Entries of a folder without containers that are looked at, if all of them are sidecars.
LOOKED_AT = 1000


def container_of(place: str) -> str | None:
    """The kind of container that a path or an address names; None for anything else."""
    kind = _kind(place) or _kind(place, NAMED)
    return None if kind and not is_remote(place) and os.path.isdir(place) else kind


def check(root: str) -> None:
    """Raise UsageError where there is nothing, or a dataset."""
    if _is_glob(root):
        if not _matches(root):
            raise UsageError(f"source {rules.printable(root)} matches nothing: check the pattern")
    elif is_remote(root):
        prefix.check(root)
    else:
        directory.check(root)


def expanded(root: str) -> list[str]:
    """The paths or addresses that a source which is there stands for, sorted; mostly itself alone.
    A glob passes our own outputs over."""
    found = _matches(root) if _is_glob(root) else [root]
    return [place for match in found for place in _places(match)]


def _places(root: str) -> list[str]:
    if container_of(root):
        return [root]
    return _saved(root) or _containers_in(root) or [root]


def is_there(root: str) -> bool:
    """Whether a source is still there. An empty folder is what unmounting leaves."""
    if _is_glob(root):
        return bool(_matches(root))
    return prefix.is_there(root) if is_remote(root) else directory.is_there(root)


def _is_glob(root: str) -> bool:
    if set("*?[").isdisjoint(os.path.basename(root)):
        return False
    return not (prefix.is_there(root) if is_remote(root) else os.path.lexists(root))


def _matches(root: str) -> list[str]:
    folder, pattern = os.path.split(root)
    names = prefix.names(folder) if is_remote(folder) else [name for name, _ in _entries(folder)]
    seen = (name for name in names if not name.startswith(".") or pattern.startswith("."))
    found = sorted(os.path.join(folder, name) for name in seen if fnmatchcase(name, pattern))
    return [place for place in found if not _is_output(place)]


def _is_output(place: str) -> bool:
    """Whether it is a dataset of ours. In a store only names without an extension are looked at."""
    if is_remote(place):
        return "." not in os.path.basename(place) and (locate(place) / MARK).is_dir()
    return os.path.exists(os.path.join(place, MARK))


def _containers_in(folder: str) -> list[str]:
    """The containers in a folder that has nothing else, but for what travels beside them."""
    found: dict[str, list[str]] = {}
    for count, (name, is_folder) in enumerate(_entries(folder)):
        if name.startswith("."):
            continue
        if not is_folder and (kind := _kind(name)):
            found.setdefault(kind, []).append(os.path.join(folder, name))
        elif is_folder or not rules.passed_over(name) or (count >= LOOKED_AT and not found):
            return []
    return next((sorted(found[kind]) for kind in CONTAINERS if kind in found), [])


def _saved(folder: str) -> list[str]:
    """The files of a dataset that `datasets` has saved here. Others may lie beside them: what
    was computed of it since."""
    if splits := _told(folder, SPLITS, lambda told: told["splits"]):
        return [file for split in splits for file in _saved(os.path.join(folder, split))]
    files = _told(folder, SAVED, lambda told: [file["filename"] for file in told["_data_files"]])
    return [os.path.join(folder, file) for file in files]


def _told(folder: str, name: str, names: Callable[[Any], list[str]]) -> list[str]:
    """Names of what lies in a folder, from a file there; none if it is not there, or another."""
    try:
        found = names(json.loads((locate(folder) / name).read_bytes()))
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [name for name in found if isinstance(name, str) and os.path.basename(name) == name]


def _kind(name: str, kinds: Mapping[str, tuple[str, ...]] = CONTAINERS) -> str | None:
    lower = name.lower()
    return next((kind for kind, ends in kinds.items() if lower.endswith(ends)), None)


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """The names of what lies right in a folder, and whether each is a folder itself."""
    return prefix.entries(folder) if is_remote(folder) else directory.entries(folder)
