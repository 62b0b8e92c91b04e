"""Prefixes in an object store: list them in a fixed order, and read an object from them.

The same tree on a disk and in a store gives the same ids in the same order. Folders are listed one
by one, so memory grows with the largest, not with the bucket.
"""

import errno
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileType, S3FileSystem

from resfeat.errors import Failure, StoreError, UsageError, first_line
from resfeat.sources.item import Item, table_of
from resfeat.sources.rules import extent, folder_of, passed_over, printable
from resfeat.spec import SourceOptions
from resfeat.storage import SCHEME, is_refused, patiently, store

# Parts of a key that no path has (two slashes leave an empty one): the AWS library would read
# another object in its place.
UNUSABLE = ("", ".", "..")
TABLE = 8192


def check(root: str) -> None:
    """Raise UsageError for a source that is not there, or is a dataset."""
    path = root.removeprefix(SCHEME)
    if not set(UNUSABLE).isdisjoint(path.split("/")):
        raise UsageError(f"source {root} has an empty part, '.' or '..': leave it out")
    kind = _info(path).type
    if kind == FileType.NotFound:
        raise UsageError(f"source {root} does not exist: check the address")
    if kind == FileType.Directory and _is_dataset(_list(path)):
        raise UsageError(f"source {root} is a resfeat dataset: name a prefix of images")


class Prefixes:
    """One or more prefixes (or single objects); see `listing.Part`."""

    carried = ()

    def __init__(self, roots: Sequence[str], base: str, options: SourceOptions) -> None:
        """roots: URIs, sorted by their components. base: what the ids leave out of them."""
        self._labelled, self._base = options.label_from == "parent", base
        self._paths = [root.removeprefix(SCHEME) for root in roots]
        self.skipped = Counter[str]()

    def tables(self) -> Iterator[pa.Table]:
        items = self._items()
        while some := list(itertools.islice(items, TABLE)):
            yield table_of(some)

    def _items(self) -> Iterator[Item]:
        self.skipped.clear()
        for path in self._paths:
            info = _info(path)
            if info.type == FileType.Directory:
                yield from self._walk(path, _list(path))
            elif info.type == FileType.File:
                yield self._item(info)

    def _walk(self, folder: str, entries: Sequence[FileInfo]) -> Iterator[Item]:
        # A key may also be the beginning of others: a file and a folder of one name.
        for info in sorted(entries, key=lambda info: (info.base_name.encode(), info.type.value)):
            if info.path == folder or info.base_name in UNUSABLE:
                self.skipped["unusable key"] += 1
            elif info.type == FileType.Directory and not info.base_name.startswith("."):
                below = _list(info.path)
                if _is_dataset(below):
                    self.skipped["resfeat output"] += 1
                else:
                    yield from self._walk(info.path, below)
            elif kind := passed_over(info.base_name):
                self.skipped[kind] += 1
            else:
                yield self._item(info)

    def _item(self, info: FileInfo) -> Item:
        return Item(
            id=printable((SCHEME + info.path).removeprefix(self._base)),
            uri=SCHEME + quote(info.path),
            size=info.size,
            mtime=_whole_seconds(info),
            label=folder_of(info.path) if self._labelled else None,
        )


def is_there(root: str) -> bool:
    return bool(_info(root.removeprefix(SCHEME)).type != FileType.NotFound)


def entries(folder: str) -> Iterator[tuple[str, bool]]:
    """The names of what lies right below a prefix, and whether each is one, too."""
    for info in _list(folder.removeprefix(SCHEME)):
        yield info.base_name, info.type == FileType.Directory


def opened(uri: str) -> tuple[Callable[[int, int], bytes], int, int, str | None]:
    """How to read an object piece by piece, by start and length; its size, mtime and etag. Raises
    FileNotFoundError, and StoreError where the store is out of reach or does not let us."""
    path = unquote(uri.removeprefix(SCHEME))
    if (info := _info(path)).type != FileType.File:
        raise FileNotFoundError(errno.ENOENT, "no such object")

    def fetch(start: int, length: int) -> bytes:
        def get() -> bytes:
            with _store(path).open_input_file(path) as file:
                return bytes(file.read_at(length, start))

        return patiently(uri, get)

    return fetch, info.size, _whole_seconds(info), None


def read(item: Item) -> tuple[bytes, int, int] | Failure:
    """See `sources.read`. Raises StoreError where the whole store is out of reach."""
    path = unquote(item.uri.removeprefix(SCHEME))

    def get() -> tuple[bytes, int, int] | Failure:
        with _store(path).open_input_file(path) as file:
            if isinstance(where := extent(item, file.size()), Failure):
                return where
            start, size = where
            data = file.read_at(size, start)
            if len(data) != size:  # another object has taken its place meanwhile
                raise OSError(f"{len(data):,} of {size:,} bytes came")
            written = file.metadata()["Last-Modified"].decode()
        seconds = datetime.fromisoformat(written.replace("Z", "+00:00")).timestamp()
        return data, size, round(seconds * 1_000_000)

    try:
        return patiently(item.uri, get)
    except FileNotFoundError:
        return Failure("read", "not_found", "no such object")
    except StoreError as error:
        message = first_line(error.__cause__ or error)
        if is_refused(error):
            return Failure("read", "permission", message)
        _info(path.partition("/")[0])  # is it this object, or the store?
        return Failure("read", "io_error", message)


def _whole_seconds(info: FileInfo) -> int:
    """The mtime as in the header of an object; some stores list milliseconds."""
    return int(info.mtime_ns // 10**9 * 10**6)


def _is_dataset(entries: Sequence[FileInfo]) -> bool:
    return any(info.base_name == "_resfeat" for info in entries)


def _list(path: str) -> Sequence[FileInfo]:
    selector = FileSelector(path, allow_not_found=True)
    return patiently(SCHEME + path, lambda: _store(path).get_file_info(selector))


def _info(path: str) -> FileInfo:
    return patiently(SCHEME + path, lambda: _store(path).get_file_info(path))


def _store(path: str) -> S3FileSystem:
    return store(path.partition("/")[0])
