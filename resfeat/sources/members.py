"""Reading members of a tar: those that lie together at once, those of a compressed tar in order."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator, Sequence

from resfeat.errors import Failure, StoreError
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
    """What these members of a tar that is not compressed are now. They are ascending, and lie
    together: in a store, all from the first to the last is one request."""
    known = [_known(item) for item in items]
    wanted = [item for item, why in zip(items, known, strict=True) if not why]
    if not wanted:
        return [why for why in known if why]
    found = iter(_in_store(wanted) if is_remote(wanted[0].uri) else _on_disk(wanted))
    return [why or next(found) for why in known]


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
        yield from (_known(item) or directory.failure(error) for item in waiting)
    except StoreError as error:
        why = prefix.failure(items[0].uri, error)
        yield from (_known(item) or why for item in waiting)


def _known(item: Item) -> Failure | None:
    """Why a member is not read, as far as that is clear before."""
    if isinstance(why := failure_of(item) or extent(item, sys.maxsize), Failure):
        return why
    return None


def _on_disk(items: Sequence[Item]) -> list[Content | Failure]:
    # Each is read by itself: the system reads ahead, and one large buffer to cut up costs twice.
    try:
        with directory.opened(items[0].uri) as (file, status):
            mtime = status.st_mtime_ns // 1000
            if items[0].mtime not in (None, mtime):
                return [_CHANGED] * len(items)
            contents = [directory.pread(file, item.offset or 0, item.size or 0) for item in items]
            now = os.fstat(file)
    except OSError as error:
        return [directory.failure(error)] * len(items)
    if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        return [_CHANGED] * len(items)
    return [
        (data, len(data), mtime) if len(data) == item.size else _CHANGED
        for item, data in zip(items, contents, strict=True)
    ]


def _in_store(items: Sequence[Item]) -> list[Content | Failure]:
    start, end = place_of(items[0])[0], max(end for _, end in map(place_of, items))
    window = prefix.read(items[0]._replace(offset=start, size=end - start))
    if isinstance(window, Failure):
        return [_CHANGED if window.reason == "bad_container" else window] * len(items)
    data, _, mtime = window
    if items[0].mtime not in (None, mtime):
        return [_CHANGED] * len(items)
    places = map(place_of, items)
    return [(data[first - start : last - start], last - first, mtime) for first, last in places]


def _following(tar: Opened, item: Item) -> Content | Failure:
    start, end = place_of(item)
    pieces = list[bytes]()
    try:
        tar.file.seek(start)
        while start < end and (piece := tar.file.read(min(end - start, MOST_BYTES))):
            pieces.append(piece)
            start += len(piece)
    except StoreError as error:
        return prefix.failure(item.uri, error)
    except DAMAGED as error:
        is_replaced = isinstance(error, OSError) and error.errno == errno.ESTALE
        return _CHANGED if is_replaced else _DAMAGED
    if not tar.is_same():
        return _CHANGED
    return (b"".join(pieces), item.size or 0, tar.mtime) if start == end else _DAMAGED
