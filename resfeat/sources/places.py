"""What a source stands for: a glob for what matches it, a folder of containers for these.

A container is a file that holds many images. This works for every kind that is in `CONTAINERS`, on
a disk and in a store.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase

from resfeat.errors import UsageError
from resfeat.sources import directory, prefix, rules
from resfeat.storage import is_remote

# By extension. Where a folder has several kinds, the others describe the first: beside its tars,
# img2dataset writes what it knows of them as Parquet.
CONTAINERS = {"tar": (".tar", ".tar.gz", ".tgz")}
# Entries of a folder without containers that are looked at, if all of them are sidecars.
LOOKED_AT = 1000


def container_of(place: str) -> str | None:
    """The kind of container that a path or an address names; None for anything else."""
    kind = _kind(place)
    return None if kind and not is_remote(place) and os.path.isdir(place) else kind


def expanded(root: str) -> list[str]:
    """The paths or addresses that a source stands for, sorted; mostly itself alone. Raises
    UsageError where there is nothing, or a dataset."""
    if _is_glob(root):
        if found := _matches(root):
            return found
        raise UsageError(f"source {rules.printable(root)} matches nothing: check the pattern")
    if is_remote(root):
        prefix.check(root)
    else:
        directory.check(root)
    return [root] if container_of(root) else _containers_in(root) or [root]


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
    names = (name for name, _ in _entries(folder) if not name.startswith(".") or pattern[0] == ".")
    return sorted(os.path.join(folder, name) for name in names if fnmatchcase(name, pattern))


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


def _kind(name: str) -> str | None:
    lower = name.lower()
    return next((kind for kind, ends in CONTAINERS.items() if lower.endswith(ends)), None)


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """The names of what lies right in a folder, and whether each is a folder itself."""
    return prefix.entries(folder) if is_remote(folder) else directory.entries(folder)
