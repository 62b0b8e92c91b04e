"""Whether a worker's machine sees the files that the driver's does.

Without a file system that they share, a worker would find none of the images, and make a failure of
each. So it looks first, at what the driver has seen.
"""

import os
from collections.abc import Sequence
from contextlib import suppress

from resfeat.dataset import Layout, Record
from resfeat.errors import ResfeatError
from resfeat.sources import container_of, is_local, is_there, path_of

FOLDERS = 16  # of images, that are looked at; more would be as many requests to a file server


def in_sight(sources: Sequence[str], uris: Sequence[str]) -> tuple[str, ...]:
    """Sources and folders on a disk that have images and are there. The workers need no table that
    only lists what lies elsewhere. uris: of images, from all over the listing."""
    files = set(map(path_of, filter(is_local, uris)))
    roots = [
        root
        for root in sources
        if os.path.isabs(root) and (root in files or container_of(root) != "table")
    ]
    folders = _far_apart(sorted(set(map(os.path.dirname, files))))
    return tuple(filter(_sees, dict.fromkeys((*roots, *folders))))


def _far_apart(folders: Sequence[str]) -> list[str]:
    """At most FOLDERS of these, in as many parts of the tree as can be: what is mounted, and may be
    missing elsewhere, mostly is a folder high up."""
    some: list[str] = []
    for depth in range(1, max((folder.count("/") for folder in folders), default=0) + 1):
        tops = {tuple(folder.split("/")[: depth + 1]): folder for folder in folders}
        each = list(tops.values())
        if len(each) > FOLDERS:  # of these, too, as many as there is room for, all along them
            evenly = (each[number * len(each) // FOLDERS] for number in range(FOLDERS))
            return list(dict.fromkeys([*some, *evenly]))[:FOLDERS]
        some = each
    return some


def check_sight(layout: Layout, created: str, paths: Sequence[str], machine: str) -> None:
    """Raise ResfeatError where this machine does not see these paths and the dataset of that time
    of creation, or may not write there."""
    unseen = [path for path in paths if not _sees(path)]
    if layout.is_on_disk and not _is_dataset(layout, created):
        unseen.append(str(layout.root))
    if unseen:
        raise ResfeatError(
            f"the machine {machine} does not see {unseen[0]} as it is where the run was started: "
            "mount it there under the same path, and give the same command again, it resumes"
        )
    if layout.is_on_disk and not os.access(str(layout.tmp), os.W_OK | os.X_OK):
        raise ResfeatError(
            f"the machine {machine} may not write to {layout.root}: mount it there so that it can "
            "be written, and give the same command again, it resumes"
        )


def _sees(path: str) -> bool:
    with suppress(OSError):  # of one that may not be opened
        return is_there(path)
    return False


def _is_dataset(layout: Layout, created: str) -> bool:
    """Whether it is that very dataset, and not one of the same name on a disk of this machine."""
    try:
        os.listdir(str(layout.private))  # so that a network file system looks anew
    except OSError:
        return False
    record = Record.load(layout)
    return record is not None and record.created == created
