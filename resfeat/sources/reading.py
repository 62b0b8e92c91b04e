"""Reading images: one by one, or in runs of those that lie together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from threading import Condition

from resfeat.errors import Failure
from resfeat.sources import cells, directory, members, prefix, web
from resfeat.sources.item import Content, Item, failure_of
from resfeat.storage import is_remote
from resfeat.storage.web import is_web

# A run has so many images, of so many bytes. In a store each request takes long, and each object is
# a run of its own.
RUN_IMAGES, RUN_BYTES = 32, 8 * 1024**2
READ_AT_ONCE = 16  # runs of what is read ahead, since each may wait for a store
# Members of a tar are read together, with what lies between them if that is no more than this.
GAP = 256 * 1024
# Of what is read in order: bytes that may wait to be decoded before more is read, and how long to
# wait for that. Then a decoder may hang, and whoever wants more has to find that out.
MOST_WAITING, WAIT_SECONDS = 64 * 1024**2, 1.0


@dataclass(frozen=True)
class Run:
    """Items that are read one after the other. places: theirs in what was to be read. taken: gives,
    once, what was read already, because it can only be read in order."""

    places: Sequence[int]
    items: Sequence[Item]
    taken: Callable[[], list[Content | Failure]] | None = None

    def read(self) -> list[Content | Failure]:
        """What each of them is now. Raises ResfeatError where the store is out of reach."""
        if self.taken:
            return self.taken()
        if members.is_member(self.items[0]):
            return members.read(self.items)
        return [read(item) for item in self.items]


class _Waiting:
    """What was read and is not taken yet: no more than `MOST_WAITING` bytes and a run."""

    def __init__(self) -> None:
        self._bytes, self._fewer = 0, Condition()

    def hold(self, contents: list[Content | Failure]) -> Callable[[], list[Content | Failure]]:
        """Wait for room. Returns what gives the contents."""
        size = sum(len(each[0]) for each in contents if not isinstance(each, Failure))

        def take() -> list[Content | Failure]:
            with self._fewer:
                self._bytes -= size
                self._fewer.notify()
            return contents

        with self._fewer:
            self._fewer.wait_for(lambda: self._bytes <= MOST_WAITING, WAIT_SECONDS)
            self._bytes += size
        return take


def runs(items: Sequence[Item], places: Sequence[int], within: int) -> Generator[Run]:
    """Runs of the items at these places, ascending. None has places on both sides of a multiple of
    `within`."""
    for _, alike in itertools.groupby(places, lambda place: _way(items[place])):
        some = list(alike)
        if cells.is_cell(items[some[0]]):
            waiting = _Waiting()
            for run, found in _of_cells(items, some, within):
                yield replace(run, taken=waiting.hold(found))
            continue
        cut = _cut(items, some, within)
        if members.is_streamed(items[some[0]]):
            waiting = _Waiting()
            with closing(members.streamed([items[place] for place in some])) as contents:
                for run in cut:
                    read_already = list(itertools.islice(contents, len(run.items)))
                    yield replace(run, taken=waiting.hold(read_already))
        else:
            yield from cut


def read_ahead(items: Sequence[Item], count: int) -> Iterator[Content | Failure]:
    """What each of the items is now, in their order; `count` of them are read at a time, in the
    order in which they lie."""
    for start in range(0, len(items), count):
        some = items[start : start + count]
        order = sorted(range(len(some)), key=lambda n: (some[n].uri, some[n].offset or 0))
        lying = [some[n] for n in order]
        found: dict[int, Content | Failure] = {}
        with ThreadPoolExecutor(READ_AT_ONCE, "ahead") as pool:
            every = runs(lying, range(len(lying)), len(lying))
            for run, contents in [(run, pool.submit(run.read)) for run in every]:
                found |= zip((order[place] for place in run.places), contents.result(), strict=True)
        yield from (found[n] for n in range(len(some)))


def _cut(items: Sequence[Item], places: Sequence[int], within: int) -> Iterator[Run]:
    for _, together in itertools.groupby(places, lambda place: place // within):
        some = list(together)
        while some:
            count = _fitting([items[place] for place in some[:RUN_IMAGES]])
            yield Run(some[:count], [items[place] for place in some[:count]])
            some = some[count:]


def _of_cells(
    items: Sequence[Item], places: Sequence[int], within: int
) -> Iterator[tuple[Run, list[Content | Failure]]]:
    """Runs of rows of one file, with what was read. How large rows are is known only then."""
    held, contents, size = list[int](), list[Content | Failure](), 0
    with closing(cells.streamed([items[place] for place in places])) as found:
        for place, cell in zip(places, found, strict=True):
            content = failure_of(items[place]) or _resolved(cell)
            more = 0 if isinstance(content, Failure) else content[1]
            is_full = len(held) == RUN_IMAGES or size + more > RUN_BYTES
            if held and (is_full or held[0] // within != place // within):
                yield Run(held, [items[n] for n in held]), contents
                held, contents, size = [], [], 0
            held.append(place)
            contents.append(content)
            size += more
    yield Run(held, [items[n] for n in held]), contents


def _fitting(items: Sequence[Item]) -> int:
    """How many of these items, at least one, the first run has."""
    if members.is_member(items[0]):
        first, reached = members.place_of(items[0])
        for count, (start, end) in enumerate(map(members.place_of, items)):
            if end - first > RUN_BYTES or start - reached > GAP:
                return max(1, count)
            reached = end
        return len(items)
    if not is_local(items[0].uri):
        return 1
    sizes = itertools.accumulate(item.size or 0 for item in items)
    return max(1, sum(size <= RUN_BYTES for size in sizes))


def _way(item: Item) -> str:
    """What must be alike for items to be read in one run."""
    if members.is_member(item):
        return item.uri
    if cells.is_cell(item):
        return f"{item.column} of {item.uri}"
    return "disk" if is_local(item.uri) else "elsewhere"


def is_local(uri: str) -> bool:
    return uri.startswith("file://")


def read(item: Item) -> Content | Failure:
    """An image's bytes, and what they are now.

    Of a file that holds several images, its own bytes and the mtime of the file. Raises
    ResfeatError where the store that holds it is out of reach.
    """
    if failure := failure_of(item):
        return failure
    if members.is_member(item):
        contents = members.streamed if members.is_streamed(item) else members.read
        return next(iter(contents([item])))
    if cells.is_cell(item):
        return _resolved(next(cells.streamed([item])))
    if is_web(item.uri):
        return web.read(item)
    return prefix.read(item) if is_remote(item.uri) else directory.read(item)


def _resolved(cell: cells.Cell) -> Content | Failure:
    return read(cell) if isinstance(cell, Item) else cell
