"""Reading images: one by one, or in runs of those that lie together."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from resfeat.errors import Failure
from resfeat.sources import directory, prefix
from resfeat.sources.item import Item, failure_of
from resfeat.storage import is_remote

# An image's bytes, with the size (bytes) and the mtime (microseconds) that they had when read.
Content = tuple[bytes, int, int | None]

# A run has so many images, of so many bytes. In a store each request takes long, and each object is
# a run of its own.
RUN_IMAGES, RUN_BYTES = 32, 8 * 1024**2


@dataclass(frozen=True)
class Run:
    """Items that are read one after the other. places: theirs in what was to be read."""

    places: Sequence[int]
    items: Sequence[Item]

    def read(self) -> list[Content | Failure]:
        """What each of them is now. Raises ResfeatError where the store is out of reach."""
        return [read(item) for item in self.items]


def runs(items: Sequence[Item], places: Sequence[int], within: int) -> Generator[Run]:
    """Runs of the items at these places, ascending. None has places on both sides of a multiple of
    `within`."""
    for _, some in itertools.groupby(places, lambda place: (place // within, _way(items[place]))):
        yield from _cut(items, list(some))


def read_ahead(items: Sequence[Item], count: int) -> Iterator[Content | Failure]:
    """What each of the items is now, in their order; `count` of them are read at a time, in the
    order in which they lie."""
    for start in range(0, len(items), count):
        some = items[start : start + count]
        order = sorted(range(len(some)), key=lambda n: (some[n].uri, some[n].offset or 0))
        lying = [some[n] for n in order]
        found: dict[int, Content | Failure] = {}
        for run in runs(lying, range(len(lying)), len(lying)):
            found |= zip((order[place] for place in run.places), run.read(), strict=True)
        yield from (found[n] for n in range(len(some)))


def _cut(items: Sequence[Item], places: Sequence[int]) -> Iterator[Run]:
    start = 0
    while start < len(places):
        most = 1 if is_remote(items[places[start]].uri) else RUN_IMAGES
        some = places[start : start + most]
        sizes = itertools.accumulate(items[place].size or 0 for place in some)
        count = max(1, sum(size <= RUN_BYTES for size in sizes))
        yield Run(some[:count], [items[place] for place in some[:count]])
        start += count


def _way(item: Item) -> str:
    """What must be alike for items to be read in one run."""
    return "store" if is_remote(item.uri) else "disk"


def read(item: Item) -> Content | Failure:
    """An image's bytes, and what they are now.

    Of a file that holds several images, its own bytes and the mtime of the file. Raises
    ResfeatError where the store that holds it is out of reach.
    """
    if failure := failure_of(item):
        return failure
    return prefix.read(item) if is_remote(item.uri) else directory.read(item)
