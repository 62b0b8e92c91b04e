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
from operator import attrgetter, itemgetter
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from resfeat.errors import Failure, Reason, ResfeatError, UsageError
from resfeat.sources import rules
from resfeat.sources.item import BEAT_SECONDS, Item, schema_of
from resfeat.sources.rules import printable
from resfeat.spec import SourceOptions

# Files at a time: a loop of system calls, then one that makes items, is a quarter faster than both
# in turn.
TOGETHER = 256
TABLE = 8192
NOT_A_FILE = "a pipe, socket, device or folder"
# Opening a FIFO without a writer would wait for ever. No effect on files.
_WITHOUT_WAITING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_BY_NAME, _SIZE = attrgetter("name"), itemgetter(stat.ST_SIZE)
_BETWEEN = "\0"  # no path has it
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

    ids: str  # with `_BETWEEN` between them
    uris: str
    label: str | None
    size: NDArray[np.int64]
    mtime: NDArray[np.int64]


def _table(runs: Sequence[_Files]) -> pa.Table:
    counts = [len(run.size) for run in runs]

    def each(name: str) -> pa.Array:
        together = pa.array([getattr(run, name) for run in runs if len(run.size)], pa.string())
        return pc.split_pattern(together, _BETWEEN).flatten()

    columns = {field.name: pa.nulls(sum(counts), field.type) for field in schema_of()} | {
        "id": each("ids"),
        "uri": each("uris"),
        "size": np.concatenate([run.size for run in runs]),
        "mtime": np.concatenate([run.mtime for run in runs]),
        "label": pa.array(np.repeat([run.label for run in runs], counts), pa.string()),
    }
    return pa.table(columns, schema=schema_of())


@dataclass
class _Folder:
    """A folder that is being listed."""

    path: str
    key: int
    linked: bool  # whether a link leads to it, or to a folder above it
    runs: Iterator[_Entry | list[_Entry]]  # in their order: a folder, or several files at a time
    # By which its files are looked up, faster than by a path. Only a folder without subfolders has
    # one, so that however deep the tree, one is open at a time.
    descriptor: int | None

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


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
            held.append(some)
            rows += len(some.size)
            if rows >= TABLE or time.monotonic() - since > BEAT_SECONDS:
                yield _table(held)
                held, rows, since = [], 0, time.monotonic()
        if rows:
            yield _table(held)

    def _runs(self) -> Iterator[_Files]:
        self.skipped.clear()
        # Every folder that was met, and whether a link leads there. Sources keep their own names.
        met = {_key(os.stat(root)): False for root in self.roots}
        for root in self.roots:
            if os.path.isdir(root):
                yield from self._walk(root, met)
            else:
                folder, name = os.path.split(root)
                yield self._items(folder, [name], [os.stat(root)])

    def _walk(self, root: str, met: dict[int, bool]) -> Iterator[_Files]:
        above = [_open(root, _key(os.stat(root)), linked=False)]
        try:
            while above:
                folder = above[-1]
                for some in folder.runs:
                    if isinstance(some, list):
                        yield self._files(folder.path, some)
                    elif below := self._enter(some, above, met):
                        above.append(below)
                        break
                else:
                    above.pop().close()
        finally:
            for folder in above:
                folder.close()

    def _enter(
        self, entry: _Entry, above: Sequence[_Folder], met: dict[int, bool]
    ) -> _Folder | None:
        if (status := _status(entry)) is None:
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

    def _files(self, folder: str, entries: Sequence[_Entry]) -> _Files:
        names = [entry.name for entry in entries]
        if rules.may_be_passed_over(names):
            self.skipped.update(filter(None, map(rules.passed_over, names)))
            entries = [entry for entry in entries if not rules.passed_over(entry.name)]
        try:
            statuses = [entry.stat() for entry in entries]
        except OSError:  # a dangling link, or gone again
            found = [_status(entry) for entry in entries]
            entries = [entry for entry, status in zip(entries, found, strict=True) if status]
            statuses = [status for status in found if status]
            if gone := len(found) - len(statuses):
                self.skipped["vanished while listing"] += gone
        if len(entries) < len(names):
            names = [entry.name for entry in entries]
        return self._items(folder, names, statuses)

    def _items(
        self, folder: str, names: Sequence[str], statuses: Sequence[os.stat_result]
    ) -> _Files:
        folder = os.path.join(folder, "")
        above, text = folder[len(self._base) :], _BETWEEN.join(names)
        quoted = quote_from_bytes(os.fsencode(text), safe=_BETWEEN)
        if text.isascii() and "\\" not in text:
            start = printable(above)
            ids = start + text.replace(_BETWEEN, _BETWEEN + start)
        else:
            ids = _BETWEEN.join([printable(above + name) for name in names])
        place = "file://" + quote_from_bytes(os.fsencode(folder))
        uris = place + quoted.replace(_BETWEEN, _BETWEEN + place)
        label = rules.folder_of(folder) if self._labelled else None
        sizes = np.fromiter(map(_SIZE, statuses), np.int64, len(statuses))
        mtimes = np.array([status.st_mtime_ns // 1000 for status in statuses], np.int64)
        return _Files(ids, uris, label, sizes, mtimes)


def _open(path: str, key: int, linked: bool) -> _Folder:
    descriptor: int | None = None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        entries, folders = _scan(descriptor)
        if folders:
            os.close(descriptor)
            descriptor = None
            entries, folders = _scan(path)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        raise ResfeatError(
            f"cannot list {printable(path)}: {error.strerror}; "
            "make it readable, or leave it out of the sources"
        ) from error
    return _Folder(path, key, linked, _runs(entries, folders), descriptor)


def _scan(place: str | int) -> tuple[list[_Entry], list[int]]:
    """The entries of a folder, sorted as their keys in a store would be, and which are folders."""
    with os.scandir(place) as scan:
        entries = list(scan)
    # The order of ASCII strings is that of their bytes.
    is_ascii = "".join([entry.name for entry in entries]).isascii()
    entries.sort(key=_BY_NAME if is_ascii else lambda entry: os.fsencode(entry.name))
    try:
        folders = [n for n, entry in enumerate(entries) if entry.is_dir()]
    except OSError:  # of a link to itself
        folders = [n for n, entry in enumerate(entries) if _is_folder(entry)]
    if folders:
        entries, folders = _as_keys(entries, folders)
    return entries, [n for n in folders if entries[n].name[0] != "."]


def _as_keys(entries: list[_Entry], folders: list[int]) -> tuple[list[_Entry], list[int]]:
    """The same in the order of keys, for which a folder is called `name/`."""
    names = [entry.name for entry in entries]
    for n in folders:
        names[n] += "/"
    is_ascii = "".join(names).isascii()
    keys = names if is_ascii else list(map(os.fsencode, names))
    order = sorted(range(len(names)), key=keys.__getitem__)
    is_folder = set(folders)
    return [entries[n] for n in order], [at for at, n in enumerate(order) if n in is_folder]


def _runs(entries: list[_Entry], folders: list[int]) -> Iterator[_Entry | list[_Entry]]:
    """Lets go of what it gives: thousands of entries and statuses fit into no core's cache."""
    total = len(entries)
    entries.reverse()
    for end in [*folders, total]:
        while count := min(TOGETHER, end - (total - len(entries))):
            some = entries[: -count - 1 : -1]
            del entries[-count:]
            yield some
        if entries:
            yield entries.pop()


def _is_folder(entry: _Entry) -> bool:
    with suppress(OSError):
        return entry.is_dir()
    return False


def _status(entry: _Entry) -> os.stat_result | None:
    """Of a dangling link, its own, since reading it gives a failure row; None if it is gone."""
    for is_followed in (True, False):
        with suppress(OSError):
            return entry.stat(follow_symlinks=is_followed)
    return None


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
