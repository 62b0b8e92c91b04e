"""Listing what lies below a prefix, page by page in key order, however much that is.

A store gives a thousand keys per request, one request after the other. Where there are folders,
several stretches of the keys are therefore listed at once. A few pages of each are held, no more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import PurePosixPath
from queue import Full, Queue
from typing import Any

from obstore.exceptions import BaseError

from resfeat.storage import remote
from resfeat.storage.clouds import BadKeyError, BrokenError, asking
from resfeat.storage.fetch import stat
from resfeat.storage.raw import Page, raw_pages
from resfeat.storage.remote import StorePath

PAGE = 1000  # keys, as many as a store gives at once
AT_ONCE = 8  # stretches that are listed
PAGES_AHEAD = 4  # of each
PAGES_EACH = 4  # about as long a stretch is, since of its last page only a part is used
DEPTH = 3  # levels of folders that are looked at for where to cut
SCOUT_SECONDS = 3.0  # to look for folders: among very many objects it would take for ever


def pages(prefix: StorePath) -> Iterator[Page]:
    """All objects below a prefix, in key order. Markers of folders are left out."""
    whole = _stretch(prefix, None, None)
    first = next(whole, None)
    if first is None:
        return
    yield first
    bounds = _bounds(prefix, first) if len(first.keys) > PAGE // 2 else []
    if bounds:
        yield from _at_once(prefix, [first.keys[-1], *bounds, None])
    else:
        yield from whole


def _bounds(prefix: StorePath, first: Page) -> list[str]:
    """Where to cut what follows the first page into stretches; nowhere without folders."""
    if not _is_ordered(prefix):
        return []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        cuts = pool.submit(_folders, prefix.root, prefix.key).result()
        for _ in range(DEPTH):
            if not 0 < len(cuts) < 2 * AT_ONCE:
                break
            below = pool.map(lambda key: _folders(prefix.root, key), cuts)
            cuts = [cut for key, inner in zip(cuts, below, strict=True) for cut in (key, *inner)]
    cuts.sort()
    in_first = bisect_right(cuts, first.keys[-1]) - bisect_right(cuts, first.keys[0])
    each = max(1, min(PAGES_EACH * in_first, len(cuts) // (2 * AT_ONCE)))
    return [cut for cut in cuts[each::each] if cut > first.keys[-1]]


def _folders(root: str, key: str) -> list[str]:
    """The folders right below a key; none where it takes too long to find them. For a thread
    without an event loop of its own."""

    async def look() -> Any:
        there = remote.store(root).list_with_delimiter_async(key or None)
        return await asyncio.wait_for(there, SCOUT_SECONDS)

    try:
        return list(asyncio.run(look())["common_prefixes"])
    except (BaseError, TimeoutError):  # whatever it is, the listing itself will meet it, too
        return []


def _is_ordered(prefix: StorePath) -> bool:
    """Whether keys come in the order of their bytes: not from an Azure account with folders."""
    return prefix.root.startswith(("s3:", "gs:"))


def _at_once(prefix: StorePath, bounds: Sequence[str | None]) -> Iterator[Page]:
    """What lies between bounds, several stretches at a time, one behind the other."""
    ended = threading.Event()

    def read(bound: tuple[str | None, str | None], into: Queue[Page | None]) -> None:
        try:
            for page in _stretch(prefix, *bound):
                if not _put(into, page, ended):
                    return
        finally:
            _put(into, None, ended)

    todo = deque(pairwise(bounds))
    going: deque[tuple[Queue[Page | None], Future[None]]] = deque()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="listing") as pool:
        try:
            while todo or going:
                while todo and len(going) < AT_ONCE:
                    given: Queue[Page | None] = Queue(PAGES_AHEAD)
                    going.append((given, pool.submit(read, todo.popleft(), given)))
                given, reading = going.popleft()
                while (page := given.get()) is not None:
                    yield page
                reading.result()
        finally:
            ended.set()


def _put(queue: Queue[Page | None], page: Page | None, ended: threading.Event) -> bool:
    """Whether it was put before all ended."""
    while not ended.is_set():
        try:
            queue.put(page, timeout=0.1)
            return True
        except Full:
            pass
    return False


def _stretch(prefix: StorePath, after: str | None, until: str | None) -> Iterator[Page]:
    """The objects below a prefix whose keys lie between two, the second included."""
    broken = 0
    while True:
        try:
            for page in _listed(prefix, after):
                yield (page := _cut(page, until))
                if page.keys:
                    after, broken = page.keys[-1], 0
                if page.is_last:
                    return
            return
        except BrokenError:  # in the middle of an answer, which obstore does not ask for again
            broken += 1
            if broken > remote.ATTEMPTS or not _is_ordered(prefix):
                raise
            time.sleep(remote.PAUSE_SECONDS)
        except BadKeyError:
            # obstore's listing ends at it (obstore#429): read on without obstore, to behind it.
            if not _is_ordered(prefix):
                raise
            for page, after in raw_pages(prefix, after):  # noqa: B007, B020
                yield (page := _cut(page, until))
            if page.is_last or after is None:
                return


def _listed(prefix: StorePath, after: str | None) -> Iterator[Page]:
    with asking(prefix):
        for some in prefix.store.list(prefix.key or None, offset=after, chunk_size=PAGE):
            if any(not each["size"] for each in some):
                some = [each for each in some if each["size"] or not _is_marker(prefix, each)]
            yield Page(
                [each["path"] for each in some],
                [each["size"] for each in some],
                [int(each["last_modified"].timestamp()) * 1_000_000 for each in some],
                [each["e_tag"] for each in some],
            )


def _is_marker(prefix: StorePath, empty: Any) -> bool:
    """Whether this is `folder/`, which obstore lists as `folder`, as it would an empty object."""
    try:
        return stat(StorePath(prefix.root, PurePosixPath(empty["path"])))[0] > 0
    except FileNotFoundError:
        return True


def _cut(page: Page, until: str | None) -> Page:
    """The page up to a key."""
    if until is None or not page.keys or page.keys[-1] <= until:
        return page
    end = bisect_right(page.keys, until)
    columns = (page.keys[:end], page.sizes[:end], page.mtimes[:end], page.etags[:end])
    return Page(*columns, page.unusable, is_last=True)
