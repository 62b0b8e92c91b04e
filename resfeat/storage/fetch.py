"""Reading objects, whole or in pieces, and with what is told of them: one request each."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from resfeat.errors import StoreError
from resfeat.storage.clouds import ChangedError, asking, split
from resfeat.storage.location import Location
from resfeat.storage.remote import StorePath, patient, store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore import GetOptions

WINDOW = 1 << 20
"""Bytes asked of a store at once, so that what lies side by side is one request."""


Known = tuple[int | None, str | None]
"""The mtime and the etag that an object had."""

# What is said of a piece that would begin behind the end, by the store or by obstore.
_PAST_END = re.compile("416 |StartTooLarge")


class Fetched(NamedTuple):
    """An object, or a piece of it, and what the object was when it was read."""

    data: bytes
    size: int  # of the whole object, bytes
    mtime: int  # microseconds since 1970 in UTC, whole seconds: a header has no more
    etag: str | None  # in quotes


@patient
def fetch(
    address: str | StorePath,
    start: int | None = None,
    length: int | None = None,
    *,
    etag: str | None = None,
    most: int | None = None,
) -> Fetched:
    """An object, or up to `length` > 0 bytes of it from `start` on, in one request.

    address: a path, or a URI, percent-encoded. etag: which content it must have. most: of an object
    of more bytes than this, no data is read. Raises FileNotFoundError, ChangedError where `etag` is
    not what is there, RefusedError, and StoreError where the store is out of reach.
    """
    root, key = _place(address)
    options: GetOptions = {"if_match": quoted(etag)} if etag else {}
    if start is not None or length is not None:
        begin = start or 0
        options["range"] = {"offset": begin} if length is None else (begin, begin + length)
    try:
        with asking(address):
            found = store(root).get(key, options=options)
            told = found.meta
            is_read = most is None or told["size"] <= most
            return Fetched(bytes(found.bytes()) if is_read else b"", *_told(told))
    except StoreError as error:
        if not _PAST_END.search(str(error.__cause__)):
            raise
    return Fetched(b"", *stat(address))  # it ends before the piece begins


@patient
def stat(address: str | StorePath) -> tuple[int, int, str | None]:
    """Size, mtime and etag of an object, as in `Fetched`. Raises as `fetch` does."""
    root, key = _place(address)
    with asking(address):
        return _told(store(root).head(key))


def _place(address: str | StorePath) -> tuple[str, str]:
    if isinstance(address, StorePath):
        return address.root, address.key
    root, key = split(address)
    return root, unquote(key)


def _told(meta: Any) -> tuple[int, int, str | None]:
    return meta["size"], mtime_of(meta["last_modified"].timestamp()), quoted(meta["e_tag"])


def mtime_of(seconds: float) -> int:
    """Microseconds since 1970, but whole seconds: a header of an object has no more."""
    return int(seconds) * 1_000_000


def quoted(etag: str | None) -> str | None:
    """An etag as a header has it. Azure's listing gives it without its quotes."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag


class StoreFile(io.RawIOBase):
    """An object as a file. Raises ChangedError once another has taken its place."""

    def __init__(self, location: StorePath, version: Known | None) -> None:
        self._location, self._at = location, 0
        self._size, mtime, self._etag = stat(location)
        if version not in (None, (mtime, self._etag)):
            raise ChangedError(f"{location} was replaced")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        with memoryview(buffer) as view:
            wanted = min(len(view), max(0, self._size - self._at))
            if wanted:
                piece = fetch(self._location, self._at, wanted, etag=self._etag)
                view[:wanted] = piece.data
        self._at += wanted
        return wanted


def open_binary(
    location: Location, window: int = WINDOW, version: Known | None = None
) -> io.BufferedIOBase:
    """A file to read and to seek in, of which `window` bytes at least are read at once. version:
    what an object must be. Raises FileNotFoundError, and as `fetch` does."""
    if isinstance(location, Path):
        return io.BufferedReader(io.FileIO(location), window)
    return io.BufferedReader(StoreFile(location, version), window)
