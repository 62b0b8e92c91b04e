"""Reading members of a tar: those that lie together by one read, those of a compressed tar in
order."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence

from resfeat.errors import Failure
from resfeat.sources import directory, prefix
from resfeat.sources.item import Content, Item, failure_of
from resfeat.sources.rules import extent
from resfeat.sources.windowed import DAMAGED, MOST_BYTES, Opened, is_zipped, opened
from resfeat.storage import is_remote

_CHANGED = Failure(
    "read", "bad_container", "the tar has changed since it was listed: give a new -o"
)
_DAMAGED = Failure("read", "bad_container", "the tar is damaged, or cut short, here or before")


def is_member(item: Item) -> bool:
    """Whether an item is in a tar."""
    return item.offset is not None and item.column is None


def is_streamed(item: Item) -> bool:
    """Whether it can only be reached through all that comes before it."""
    return is_member(item) and is_zipped(item.uri)


def place_of(item: Item) -> tuple[int, int]:
    """Where a member begins and ends."""
    start = item.offset or 0
    return start, start + (item.size or 0)


def read(items: Sequence[Item]) -> list[Content | Failure]:
    """What these members of a tar that is not compressed are now. They are ascending, and all from
    the first to the last of them is read at once."""
    known = [_known(item) for item in items]
    places = [place_of(item) for item, why in zip(items, known, strict=True) if not why]
    if not places:
        return [why for why in known if why]
    start, end = places[0][0], max(end for _, end in places)
    window = items[0]._replace(offset=start, size=end - start, problem=None)
    content = prefix.read(window) if is_remote(window.uri) else directory.read(window)
    both = zip(items, known, strict=True)
    return [why or _cut_out(item, content, start) for item, why in both]


def streamed(items: Sequence[Item]) -> Generator[Content | Failure]:
    """The same of a compressed tar, which is read once, from its beginning."""
    waiting = iter(items)
    try:
        with opened(items[0].uri) as tar:
            is_same = tar.etag == items[0].etag and items[0].mtime in (None, tar.mtime)
            failure = None if is_same else _CHANGED
            for item in waiting:
                content = _known(item) or failure or _following(tar, item)
                if content in (_CHANGED, _DAMAGED):
                    failure = content
                yield content
    except OSError as error:
        for item in waiting:
            yield _known(item) or directory.failure(error)


def _known(item: Item) -> Failure | None:
    """Why a member is not read, as far as that is clear before."""
    if isinstance(why := failure_of(item) or extent(item, sys.maxsize), Failure):
        return why
    return None


def _cut_out(item: Item, window: Content | Failure, first: int) -> Content | Failure:
    """A member from what begins at this byte of its tar."""
    if isinstance(window, Failure):
        return _CHANGED if window.reason == "bad_container" else window
    data, _, mtime = window
    if item.mtime not in (None, mtime):
        return _CHANGED
    start, end = place_of(item)
    return data[start - first : end - first], end - start, mtime


def _following(tar: Opened, item: Item) -> Content | Failure:
    start, end = place_of(item)
    pieces = list[bytes]()
    try:
        tar.file.seek(start)
        while start < end and (piece := tar.file.read(min(end - start, MOST_BYTES))):
            pieces.append(piece)
            start += len(piece)
    except DAMAGED:
        return _DAMAGED
    if not tar.is_same():
        return _CHANGED
    return (b"".join(pieces), item.size or 0, tar.mtime) if start == end else _DAMAGED
