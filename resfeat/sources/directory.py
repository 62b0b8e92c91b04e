"""Directories on a local disk: list them in a fixed order, and read images from them.

Every file is listed, whatever it is: images are recognised by content. Passed over and counted are
hidden files and folders (a leading dot), `rules.SIDECARS`, and resfeat's own output folders.

Symbolic links are followed. A folder that several paths lead to, because of links, is listed once:
the sources themselves under their own names, any other where the listing first comes to it. Without
links every folder is listed, even if the file system's inode numbers mean nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
import pyarrow as pa

from resfeat.errors import Failure, Reason, ResfeatError, UsageError
from resfeat.sources import rules
from resfeat.sources.item import BEAT, BEAT_SECONDS, Item, schema_of
from resfeat.sources.rules import printable
from resfeat.spec import SourceOptions

TOGETHER = 512  # files that are looked at in a row, and become items in a row
TABLE = 8192
NOT_A_FILE = "a pipe, socket, device or folder"
# Opening a FIFO without a writer would wait for ever. No effect on files.
_WITHOUT_WAITING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_AS_A_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_BETWEEN = b"\0"  # no path has it
# To look whether there is anything to quote takes a fifth of the time that quoting takes.
_NEVER_QUOTED = _BETWEEN + bytes(n for n in range(128) if quote_from_bytes(bytes([n])) == chr(n))
_REASONS: Mapping[int | None, Reason] = {
    errno.ENOENT: "not_found",
    errno.ELOOP: "not_found",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.ENXIO: "not_regular_file",  # what open() says of a socket
    errno.ENODEV: "not_regular_file",
}

_Entry = os.DirEntry[str]


class _Files(NamedTuple):
    """Files of one folder. An object for each of millions would take a quarter of the time."""

    ids: bytes  # with `_BETWEEN` between them
    uris: bytes
    label: str | None
    sizes: list[int]
    mtimes: list[int]


def _table(runs: Sequence[_Files]) -> pa.Table:
    counts = [len(run.sizes) for run in runs]
    rows, run_of = sum(counts), pa.array(np.repeat(np.arange(len(runs)), counts))
    columns = {field.name: pa.nulls(rows, field.type) for field in schema_of()} | {
        "id": _strings([run.ids for run in runs]),
        "uri": _strings([run.uris for run in runs]),
        "size": np.fromiter(chain.from_iterable(run.sizes for run in runs), np.int64, rows),
        "mtime": np.fromiter(chain.from_iterable(run.mtimes for run in runs), np.int64, rows),
        "label": pa.array([run.label for run in runs], pa.string()).take(run_of),
    }
    return pa.table(columns, schema=schema_of())


def _strings(runs: Sequence[bytes]) -> pa.StringArray:
    """Texts in UTF-8, with `_BETWEEN` between them, as a column."""
    together = _BETWEEN.join([*runs, b""])
    ends = np.flatnonzero(np.frombuffer(together, np.uint8) == 0)
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends - np.arange(len(ends))
    text = together.replace(_BETWEEN, b"")
    return pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(text))


@dataclass
class _Folder:
    """A folder that is being listed."""

    path: str
    key: int
    linked: bool  # whether a link leads to it, or to a folder above it
    runs: Iterator[_Entry | list[str]]  # in their order: a folder, or several files at a time


def check(root: str) -> None:
    """Raise UsageError for a source that is not there, or is a dataset."""
    if not os.path.exists(root):
        raise UsageError(f"source {printable(root)} does not exist: check the path, or mount it")
    if os.path.exists(os.path.join(root, "_resfeat")):
        raise UsageError(f"source {root} is a resfeat dataset: name a folder of images")


class Directories:
    """One or more directories (or single files); see `listing.Part`."""

    carried = ()

    def __init__(self, roots: Sequence[str], base: str, options: SourceOptions) -> None:
        """roots: absolute, sorted by their components. base: what the ids leave out."""
        self._labelled, self._base = options.label_from == "parent", base
        self.roots, self.skipped = roots, Counter[str]()

    def tables(self) -> Iterator[pa.Table]:
        held, rows, since = list[_Files](), 0, time.monotonic()
        for some in self._runs():
            if some.sizes:
                held.append(some)
                rows += len(some.sizes)
            if rows >= TABLE or time.monotonic() - since > BEAT_SECONDS:
                yield _table(held) if held else BEAT
                held, rows, since = [], 0, time.monotonic()
        if held:
            yield _table(held)

    def _runs(self) -> Iterator[_Files]:
        self.skipped.clear()
        # Every folder that was met, and whether a link leads there. Sources keep their own names.
        met = {_key(os.stat(root)): False for root in self.roots}
        for root in self.roots:
            if os.path.isdir(root):
                yield from self._walk(root, met)
            else:
                status, (folder, name) = os.stat(root), os.path.split(root)
                yield self._items(folder, [name], [status.st_size], [status.st_mtime_ns // 1000])

    def _walk(self, root: str, met: dict[int, bool]) -> Iterator[_Files]:
        above = [_open(root, _key(os.stat(root)), linked=False)]
        while above:
            folder = above[-1]
            for some in folder.runs:
                if isinstance(some, list):
                    yield self._files(folder.path, some)
                elif below := self._enter(some, above, met):
                    above.append(below)
                    break
            else:
                above.pop()

    def _enter(
        self, entry: _Entry, above: Sequence[_Folder], met: dict[int, bool]
    ) -> _Folder | None:
        if (status := _status(entry.path)) is None:
            self.skipped["vanished while listing"] += 1
            return None
        key, linked = _key(status), above[-1].linked or entry.is_symlink()
        if key in met and (linked or met[key]):
            is_loop = any(key == folder.key for folder in above)
            self.skipped["link loop" if is_loop else "repeated folder"] += 1
            return None
        if os.path.exists(os.path.join(entry.path, "_resfeat")):
            self.skipped["resfeat output"] += 1
            return None
        met[key] = linked
        return _open(entry.path, key, linked)

    def _files(self, folder: str, names: Sequence[str]) -> _Files:
        if rules.may_be_passed_over(names):
            self.skipped.update(filter(None, map(rules.passed_over, names)))
            names = [name for name in names if not rules.passed_over(name)]
        try:
            sizes, mtimes = _looked_at(folder, names)
        except OSError:  # a dangling link, or gone again
            found = [(name, _status(os.path.join(folder, name))) for name in names]
            there = [(name, status) for name, status in found if status]
            if gone := len(found) - len(there):
                self.skipped["vanished while listing"] += gone
            names = [name for name, _ in there]
            sizes = [status.st_size for _, status in there]
            mtimes = [status.st_mtime_ns // 1000 for _, status in there]
        return self._items(folder, names, sizes, mtimes)

    def _items(
        self, folder: str, names: Sequence[str], sizes: list[int], mtimes: list[int]
    ) -> _Files:
        folder = os.path.join(folder, "")
        above, quoted = folder[len(self._base) :], os.fsencode("\0".join(names))
        start, ids = printable(above).encode(), quoted
        if b"\\" in ids or not ids.isascii():
            start, ids = b"", "\0".join([printable(above + name) for name in names]).encode()
        if quoted.translate(None, _NEVER_QUOTED):
            quoted = quote_from_bytes(quoted, safe=_BETWEEN).encode()
        place = b"file://" + quote_from_bytes(os.fsencode(folder)).encode()
        label = rules.folder_of(folder) if self._labelled else None
        return _Files(_behind(start, ids), _behind(place, quoted), label, sizes, mtimes)


def _behind(start: bytes, names: bytes) -> bytes:
    return start + names.replace(_BETWEEN, _BETWEEN + start)


def _looked_at(folder: str, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The sizes (bytes) and mtimes (microseconds) of files. Raises OSError where one is missing."""
    sizes, mtimes = list[int](), list[int]()
    place = os.open(folder, _AS_A_FOLDER)  # files are looked up faster by it than by their paths
    try:
        for name in names:
            status = os.stat(name, dir_fd=place)  # the next one takes its memory: keep none
            sizes.append(status.st_size)
            mtimes.append(status.st_mtime_ns // 1000)
    finally:
        os.close(place)
    return sizes, mtimes


def _open(path: str, key: int, linked: bool) -> _Folder:
    try:
        names, folders = _scan(path)
    except OSError as error:
        raise ResfeatError(
            f"cannot list {printable(path)}: {error.strerror}; "
            "make it readable, or leave it out of the sources"
        ) from error
    return _Folder(path, key, linked, _runs(names, folders))


def _scan(path: str) -> tuple[list[str], dict[str, _Entry]]:
    """The names in a folder, sorted as their keys in a store would be: those of folders end with a
    slash. And the folders by these names."""
    names, folders = list[str](), dict[str, _Entry]()
    with os.scandir(path) as scan:
        for entry in scan:
            try:
                is_folder = entry.is_dir()
            except OSError:  # of a link to itself
                is_folder = False
            if is_folder:
                folders[entry.name + "/"] = entry
            else:
                names.append(entry.name)
    names += folders
    # The order of ASCII strings is that of their bytes.
    names.sort(key=None if "".join(names).isascii() else os.fsencode)
    return names, folders


def _runs(names: list[str], folders: Mapping[str, _Entry]) -> Iterator[_Entry | list[str]]:
    """What is in a folder, in order. Hidden folders are among the files, to be passed over."""
    shown, start = list[int](), 0
    if folders:
        shown = [n for n, name in enumerate(names) if name in folders and name[0] != "."]
    for end in [*shown, len(names)]:
        for first in range(start, end, TOGETHER):
            yield names[first : min(first + TOGETHER, end)]
        if end < len(names):
            yield folders[names[end]]
        start = end + 1


def _is_folder(entry: _Entry) -> bool:
    with suppress(OSError):
        return entry.is_dir()
    return False


def _status(path: str) -> os.stat_result | None:
    """Of a link that leads nowhere, its own, since reading it gives a failure row; None if it is
    gone. Raises ResfeatError where that cannot be told."""
    with suppress(OSError):
        return os.stat(path)
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ResfeatError(
            f"cannot look at {printable(path)}: {error.strerror}; "
            "have its folder searchable (chmod +x), or leave it out of the sources"
        ) from error


def _key(status: os.stat_result) -> int:
    """Tells folders apart. One number: a listing may remember a million of them."""
    return status.st_dev << 64 | status.st_ino


def is_there(root: str) -> bool:
    """Whether a source is still there. An empty folder is what unmounting leaves."""
    if not os.path.isdir(root):
        return os.path.exists(root)
    with os.scandir(root) as entries:  # of a million, which a file server sends by and by
        return next(entries, None) is not None


def entries(folder: str) -> Iterator[tuple[str, bool]]:
    """The names of what lies right in a folder, and whether each is a folder; nothing of a file."""
    with suppress(OSError), os.scandir(folder) as scan:
        yield from ((entry.name, _is_folder(entry)) for entry in scan)


def path_of(uri: str) -> str:
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


@contextmanager
def opened(uri: str) -> Iterator[tuple[int, os.stat_result]]:
    """The descriptor and the status of a regular file. Raises OSError for anything else."""
    # Calls of the system alone: Python's files make twice as many.
    file = os.open(path_of(uri), _WITHOUT_WAITING)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ENODEV, NOT_A_FILE)
        yield file, status
    finally:
        os.close(file)


def pread(file: int, start: int, size: int) -> bytes:
    """So many bytes from a place on, or as many as there are."""
    data = os.pread(file, size, start)
    while len(data) < size and (more := os.pread(file, size - len(data), start + len(data))):
        data += more
    return data


def failure(error: OSError) -> Failure:
    """Why a file cannot be read."""
    return Failure("read", _REASONS.get(error.errno, "io_error"), error.strerror or str(error))


def read(item: Item) -> tuple[bytes, int, int] | Failure:
    """See `sources.read`. Never blocks on a pipe or a device, or reads more than `MAX_BYTES`."""
    try:
        with opened(item.uri) as (file, status):
            if isinstance(where := rules.extent(item, status.st_size), Failure):
                return where
            start, size = where
            data = pread(file, start, size)
            now = os.fstat(file)
    except OSError as error:
        return failure(error)
    # Half of what was there and half of what is there now would be a picture of neither.
    before = status.st_size, status.st_mtime_ns
    if len(data) < size or (now.st_size, now.st_mtime_ns) != before:
        return Failure("read", "io_error", "it was written to while it was read")
    return data, size, status.st_mtime_ns // 1000
