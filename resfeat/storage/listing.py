"""Listing what lies below a prefix, page by page in key order, however much that is.

A store gives a thousand keys per request, one request after the other. Where there are folders,
several stretches of the keys are therefore listed at once. Some pages of each are held, no more.
Azure is asked for one page after the other: in an account with folders its order is another.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import PurePosixPath
from queue import Full, Queue
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError

from resfeat.storage import remote
from resfeat.storage.clouds import BadKeyError, BrokenError, asking
from resfeat.storage.fetch import stat
from resfeat.storage.raw import OBJECT, Page, raw_pages
from resfeat.storage.remote import StorePath

PAGE = 1000  # keys, as many as a store gives at once
AT_ONCE = 8  # stretches that are listed
PAGES_AHEAD = 16  # of each
HEADS_AT_ONCE = 16  # requests for what lists as empty objects, of each
PAGES_EACH = 16  # about as long a stretch is, since of its last page only a part is used
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
        whole.close()
        yield from _at_once(prefix, [first.keys[-1].as_py(), *bounds, None])
    else:
        yield from whole


def _bounds(prefix: StorePath, first: Page) -> list[str]:
    """Where to cut what follows the first page into stretches; nowhere without folders."""
    if not _is_ordered(prefix):
        return []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        level, cuts = [prefix.key], list[str]()
        for _ in range(DEPTH):
            below = pool.map(lambda key: _folders(prefix.root, key), level)
            level = [folder for some in below for folder in some]
            cuts += level
            if not level or len(cuts) >= 2 * AT_ONCE:
                break
    cuts.sort()
    start, end = first.keys[0].as_py(), first.keys[-1].as_py()
    in_first = bisect_right(cuts, end) - bisect_right(cuts, start)
    each = max(1, min(PAGES_EACH * (in_first + 1), len(cuts) // (2 * AT_ONCE)))
    return [cut for cut in cuts[each::each] if cut > end]


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


def _stretch(prefix: StorePath, after: str | None, until: str | None) -> Generator[Page]:
    """The objects below a prefix whose keys lie between two, the second included."""
    broken = 0
    while True:
        try:
            for page in _listed(prefix, after):
                yield (page := _cut(page, until))
                if page.keys:
                    after, broken = page.keys[-1].as_py(), 0
                if page.is_last:
                    return
            return
        except BrokenError:  # in the middle of an answer, which obstore does not ask for again
            broken += 1
            # What is in no order is listed again from its start, or not at all.
            if broken > remote.ATTEMPTS or (after and not _is_ordered(prefix)):
                raise
            time.sleep(remote.PAUSE_SECONDS)
        except BadKeyError:
            # obstore's listing ends at it (obstore#429): read on without obstore, to behind it.
            if not _is_ordered(prefix):
                raise
            for page, after in raw_pages(prefix, after, until):  # noqa: B007, B020
                yield page
            if page.is_last or after is None:
                return


def _listed(prefix: StorePath, after: str | None) -> Iterator[Page]:
    seconds, micros = pa.timestamp("s", tz="UTC"), OBJECT.field("mtime").type
    before = after or ""
    with asking(prefix):
        # In columns, which cost a third of what a Python object for each key does.
        for some in prefix.store.list(
            prefix.key or None, offset=after, chunk_size=PAGE, return_arrow=True
        ):
            found = pa.record_batch(some)
            mtimes = found["last_modified"].cast(seconds, safe=False).cast(micros)
            columns = [found["path"], found["size"].cast(pa.int64()), mtimes, found["e_tag"]]
            objects = pa.record_batch(columns, schema=OBJECT)
            yield Page(_without_markers(prefix, objects, before))
            before = found["path"][-1].as_py()


def _without_markers(prefix: StorePath, objects: pa.RecordBatch, before: str) -> pa.RecordBatch:
    """The objects without `folder/`, which obstore lists as `folder`, as it would an empty object.
    before: the key before them."""
    empty = np.flatnonzero(np.asarray(objects["size"]) == 0)
    if not len(empty):
        return objects
    keys = [before, *objects["key"].to_pylist()]
    # Behind `a`, and up to `a/`, each key begins with `a`. Of all others only the store can tell.
    doubtful = [n for n in empty if not keys[n].startswith(keys[n + 1])]
    with ThreadPoolExecutor(HEADS_AT_ONCE) as pool:
        are_there = list(pool.map(lambda n: _is_empty(prefix, keys[n + 1]), doubtful))
    kept = np.asarray(objects["size"]) > 0
    kept[doubtful] = are_there
    return objects.filter(pa.array(kept))


def _is_empty(prefix: StorePath, key: str) -> bool:
    """Whether there is an empty object of this very key."""
    try:
        return stat(StorePath(prefix.root, PurePosixPath(key)))[0] == 0
    except FileNotFoundError:
        return False


def _cut(page: Page, until: str | None) -> Page:
    """The page up to a key."""
    if until is None or not page.keys or page.keys[-1].as_py() <= until:
        return page
    end = pc.sum(pc.less_equal(page.keys, until)).as_py()
    return Page(page.objects.slice(0, end), page.unusable, is_last=True)
