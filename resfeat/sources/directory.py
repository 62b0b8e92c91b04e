"""Directories on a local disk: list them in a fixed order, and read a file from them.

What is listed: every file below the sources, whatever its name, because an image is recognised by
its content. What is passed over, and counted: hidden files and folders (a leading dot), files whose
extension says that they are something that travels beside images (`rules.SIDECARS`), and resfeat's
own output folders. Symbolic links are followed, but not into a folder that is being walked already.
A pipe, a socket or a dangling link is listed and becomes a failure row.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from resfeat.errors import Failure, Reason, ResfeatError, UsageError
from resfeat.sources.item import Item
from resfeat.sources.rules import base_of, check_apart, folder_of, passed_over, printable, unfit


class Directories:
    """A listing of one or more directories (or single files), in a fixed order.

    Ids are paths relative to the source, or, where there are several, to their common parent, so
    that no two images share one. Iterating gives `Item`s; `skipped` then tells what was passed
    over, by extension.

    Raises UsageError where a source is missing or lies within another.
    """

    carried = ()

    def __init__(self, sources: Sequence[str], label_from: str | None = None) -> None:
        self._labelled = label_from == "parent"
        # By components, so that whatever lies within a folder sorts right behind it.
        self.roots = sorted(map(os.path.abspath, sources), key=lambda root: root.split(os.sep))
        self.skipped: Counter[str] = Counter()
        for root in self.roots:
            if not os.path.exists(root):
                raise UsageError(
                    f"source {printable(root)} does not exist: check the path, or mount it"
                )
            if os.path.exists(os.path.join(root, "_resfeat")):
                raise UsageError(f"source {root} is a resfeat dataset: name a folder of images")
        check_apart(self.roots)
        self._base = base_of(self.roots, is_folder=os.path.isdir(self.roots[0]))

    def __iter__(self) -> Iterator[Item]:
        self.skipped.clear()
        for root in self.roots:
            if os.path.isdir(root):
                yield from self._walk(root, ())
            else:
                yield self._item(root, os.stat(root))

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Item]:
        try:
            here = os.stat(folder)
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise ResfeatError(
                f"cannot list {printable(folder)}: {error.strerror}; "
                "make it readable, or leave it out of the sources"
            ) from error
        above = (*above, (here.st_dev, here.st_ino))
        for entry in entries:
            if _is_dir(entry) and not entry.name.startswith("."):
                if self._is_walkable(entry, above):
                    yield from self._walk(entry.path, above)
            elif kind := passed_over(entry.name):
                self.skipped[kind] += 1
            elif status := _status(entry):
                yield self._item(entry.path, status)
            else:
                self.skipped["vanished while listing"] += 1

    def _is_walkable(self, entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> bool:
        if os.path.exists(os.path.join(entry.path, "_resfeat")):
            self.skipped["resfeat output"] += 1
            return False
        target = _status(entry)
        if entry.is_symlink() and target and (target.st_dev, target.st_ino) in above:
            self.skipped["link loop"] += 1
            return False
        return True

    def _item(self, path: str, status: os.stat_result) -> Item:
        return Item(
            id=printable(path.removeprefix(self._base)),
            uri="file://" + quote_from_bytes(os.fsencode(path)),
            size=status.st_size,
            mtime=status.st_mtime_ns // 1000,
            label=folder_of(path) if self._labelled else None,
        )


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What the entry is; None where it is gone again."""
    with suppress(OSError):
        return entry.stat()
    with suppress(OSError):  # a dangling link: reading it will say so in a failure row
        return entry.stat(follow_symlinks=False)
    return None


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_there(root: str) -> bool:
    """Whether a source is still there. An empty folder is what unmounting leaves."""
    return bool(os.listdir(root)) if os.path.isdir(root) else os.path.exists(root)


def path_of(uri: str) -> Path:
    """The local path that a `file://` URI names."""
    return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))


def read(uri: str) -> tuple[bytes, int, int] | Failure:
    """The file's bytes with the size (bytes) and mtime (microseconds) that it has now.

    Never blocks on a pipe or a device, and reads no more than `MAX_BYTES`.
    """
    try:
        # O_NONBLOCK: opening a FIFO without a writer would wait for ever. No effect on files.
        descriptor = os.open(path_of(uri), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return _failure(error)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Failure("read", "not_regular_file", "a pipe, socket, device or folder")
        if failure := unfit(status.st_size):
            return failure
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(status.st_size + 1)  # it may grow without end
        now = os.fstat(descriptor)
    except OSError as error:
        return _failure(error)
    finally:
        os.close(descriptor)
    # Half of what was there and half of what is there now would be a picture of neither.
    if (len(data), now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        return Failure("read", "io_error", "it was written to while it was read")
    return data, len(data), status.st_mtime_ns // 1000


def _failure(error: OSError) -> Failure:
    reason: Reason = "io_error"
    if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
        reason = "not_found"
    elif isinstance(error, PermissionError):
        reason = "permission"
    elif error.errno in (errno.ENXIO, errno.ENODEV):  # what open() says of a socket
        reason = "not_regular_file"
    return Failure("read", reason, error.strerror or str(error))
