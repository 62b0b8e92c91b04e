"""A tar as a file, on a disk or in a store: read here and there, or, if compressed, in order."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple, cast

from resfeat.sources import directory, prefix
from resfeat.storage import is_remote

# At once: no header, and no file beside an image, that we want is larger.
MOST_BYTES = 1024**2
# What lies closer than this to what was read before is reached by reading on.
NEAR = 256 * 1024
# What a read fetches at least: far from the last one, and near it. In a store a request takes as
# long as a megabyte; on a disk reading on is worth nothing.
ON_DISK, IN_STORE = (4096, 4096), (16 * 1024, 4 * 1024**2)
IN_ORDER = 1024**2
# How damage to a compressed file shows.
DAMAGED = (OSError, EOFError, zlib.error)


class Windowed:
    """A file, by `fetch(start, length)`. A read fetches at least `hop` bytes, and `on` bytes where
    it lies near the last one."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, hop: int, on: int) -> None:
        self.fetch, self.size, self.hop, self.on = fetch, size, hop, on
        self._place = self._start = 0
        self._window = self.last = b""  # last: what was read last

    def tell(self) -> int:
        return self._place

    def seek(self, place: int) -> int:
        self._place = place
        return place

    def read(self, count: int) -> bytes:
        """Raises ValueError for more than `MOST_BYTES`, which only a damaged header asks for."""
        _check(count)
        count = max(0, min(count, self.size - self._place))
        held = self._start + len(self._window)
        if count and not self._start <= self._place <= held - count:
            self._window = self._fetched(self._place, count)
            self._start = self._place
        start = max(0, self._place - self._start)
        self.last = self._window[start : start + count]
        self._place += len(self.last)
        return self.last

    def _fetched(self, place: int, count: int) -> bytes:
        """So many bytes from this place on, or more."""
        held = self._start + len(self._window)
        least = self.on if 0 <= place - held <= NEAR else self.hop
        return self.fetch(place, min(max(count, least), self.size - place))

    def reaches(self, end: int) -> bool:
        """Whether the file has so many bytes."""
        return end <= self.size


class Unzipped(gzip.GzipFile):
    """The same of what a compressed file holds, which can only be read in order."""

    def __init__(self, file: Windowed) -> None:
        super().__init__(fileobj=cast(IO[bytes], file), mode="rb")
        self.last = b""

    def read(self, size: int | None = -1) -> bytes:
        _check(-1 if size is None else size)
        self.last = super().read(size)
        return self.last

    def reaches(self, end: int) -> bool:
        try:
            return self.seek(end) == end
        except DAMAGED:
            return False

    def ends_well(self) -> bool:
        """Whether the rest is as its checksum says."""
        try:
            while self.read(MOST_BYTES):
                pass
        except DAMAGED:
            return False
        return True


def _check(count: int) -> None:
    if not 0 <= count <= MOST_BYTES:
        raise ValueError(f"a header of {count:,} bytes")


class Opened(NamedTuple):
    """A tar that is open. mtime, etag: as of an `Item`. is_same: whether it is still what it was
    when it was opened."""

    file: Windowed | Unzipped
    mtime: int | None
    etag: str | None
    is_same: Callable[[], bool]


@contextmanager
def opened(uri: str) -> Iterator[Opened]:
    """Open a tar. Raises OSError where that cannot be done, StoreError where a store is out of
    reach."""
    if is_remote(uri):
        fetch, size, mtime, etag = prefix.opened(uri)
        yield Opened(_file(uri, fetch, size), mtime, etag, lambda: True)  # `fetch` sees to it
        return
    with directory.opened(uri) as (descriptor, status):

        def read(start: int, length: int) -> bytes:
            return os.pread(descriptor, length, start)

        def is_same() -> bool:
            now = os.fstat(descriptor)
            return (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)

        file = _file(uri, read, status.st_size)
        yield Opened(file, status.st_mtime_ns // 1000, None, is_same)


def is_zipped(uri: str) -> bool:
    return uri.lower().endswith((".gz", ".tgz"))


def _file(uri: str, fetch: Callable[[int, int], bytes], size: int) -> Windowed | Unzipped:
    if is_zipped(uri):
        return Unzipped(Windowed(fetch, size, IN_ORDER, IN_ORDER))
    return Windowed(fetch, size, *(IN_STORE if is_remote(uri) else ON_DISK))
