"""Which images belong together, being nearer to each other than a threshold: who is linked with
whom, directly or by way of others.

Exact: every pair is compared, a block of rows with all that follow it. By an index: each image with
its nearest. Equal vectors are linked by their bits, before anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from resfeat.dataset import Parts, vector_hashes
from resfeat.downstream.index import Index
from resfeat.downstream.kinds import prepared
from resfeat.runtimes.hardware import memory_bytes

# Rows that are held while all that follow are read: each multiple of them costs a reading of what
# is left of the dataset.
HELD_SHARE, HELD_BYTES = 8, 256 << 20
COMPARED = 1024  # rows of those at a time, with a block of a part
# By an index: as many neighbours of each. Of more that are alike others are linked by way of these.
NEIGHBOURS = 32
ROUNDING = 1e-6  # of a cosine in float32

Places = NDArray[np.int64]
Tell = Callable[[str], None]


class Links:
    """Groups of `count` things, which grow together as pairs are linked."""

    def __init__(self, count: int) -> None:
        self._above = np.arange(count)  # another of its group; itself for the first

    def link(self, left: Places, right: Places) -> None:
        """Link each of `left` with that of `right`."""
        while len(left):
            tops = self._top(left), self._top(right)
            first, last = np.minimum(*tops), np.maximum(*tops)
            apart = first != last
            if not apart.any():
                return
            # Of several that would be put above one, one is; the others come again.
            left, right = np.unique([first[apart], last[apart]], axis=1)
            self._above[right] = left

    def _top(self, of: Places) -> Places:
        top: Places = self._above[of]
        while not np.array_equal(higher := self._above[top], top):
            top = higher
        self._above[of] = top
        return top

    def groups(self) -> list[Places]:
        """Those of two or more, each ascending, in the order of their first."""
        tops = self._top(np.arange(len(self._above)))
        order = np.argsort(tops, kind="stable")
        bounds = np.flatnonzero(np.diff(tops[order])) + 1
        return [group for group in np.split(order, bounds) if len(group) > 1]


def linked(
    parts: Parts, threshold: float, index: Index | None, tell: Tell = lambda step: None
) -> tuple[list[Places], NDArray[np.uint64]]:
    """Places of images with a cosine of at least `threshold` to another of their group, and the
    hash of each image's vector.

    index: a fresh one for the cosine, by which neighbours are found; None compares all pairs.
    """
    links, hashes = Links(parts.rows), np.empty(parts.rows, np.uint64)
    least = threshold - ROUNDING
    if index:
        tell(f"looking up {parts.rows:,} images in the index")
        pairs = _near_by_index(parts, index, least, hashes)
    else:
        tell(f"comparing {parts.rows:,} images with each other")
        pairs = _near(parts, least, hashes)
    for left, right in pairs:
        links.link(left, right)
    order = np.argsort(hashes, kind="stable")
    # A vector of zeros, whose hash is 0, says nothing of its image.
    is_same = (hashes[order[1:]] == hashes[order[:-1]]) & (hashes[order[1:]] != 0)
    links.link(order[:-1][is_same], order[1:][is_same])
    return links.groups(), hashes


def _near(
    parts: Parts, least: float, hashes: NDArray[np.uint64]
) -> Iterator[tuple[Places, Places]]:
    """Pairs by comparing all. Fills in the hashes."""
    most = max(1, max(HELD_BYTES, memory_bytes() // HELD_SHARE) // (4 * parts.dim))
    start = 0
    while start < parts.rows:
        held: list[tuple[int, NDArray[np.float32]]] = []
        end = start
        for block in parts.blocks(start=start):
            cut = max(0, start - block.start)
            places, vectors = block.places[cut:], prepared(block.vectors[cut:], "cosine")
            if start == 0:
                hashes[places] = vector_hashes(block.vectors)
            for first, rows in held:
                yield from _above(least, rows, vectors, first, places[0])
            if end - start < most:
                yield from _above(least, vectors, vectors, places[0], places[0])
                held.append((int(places[0]), vectors))
                end = int(places[-1]) + 1
        start = end


def _above(
    least: float, rows: NDArray[np.float32], others: NDArray[np.float32], first: int, second: int
) -> Iterator[tuple[Places, Places]]:
    """Places of the pairs of a row and another behind it; the first of each have these places."""
    for start in range(0, len(rows), COMPARED):
        left, right = np.nonzero(rows[start : start + COMPARED] @ others.T >= least)
        left, right = left + (first + start), right + second
        is_behind = left < right
        yield left[is_behind], right[is_behind]


def _near_by_index(
    parts: Parts, index: Index, least: float, hashes: NDArray[np.uint64]
) -> Iterator[tuple[Places, Places]]:
    """Pairs of each image and its nearest. Fills in the hashes."""
    place_of = np.full(len(index.ids), -1, np.int64)  # of each row of the index
    for shard in parts.digests:
        if not len(places := parts.places_in(shard)):
            continue  # all of its images failed
        there, listed = np.flatnonzero(index.shards == shard), index.rows_of(shard)
        at = pc.index_in(parts.at(places, ["id"])["id"], value_set=listed["id"])
        place_of[there[at.to_numpy()]] = places
    for block in parts.blocks():
        hashes[block.places] = vector_hashes(block.vectors)
        cosines, found = index.nearest(prepared(block.vectors, "cosine"), NEIGHBOURS + 1)
        left, column = np.nonzero((cosines >= least) & (found >= 0))
        right = place_of[index.places_of(found[left, column])]
        left = left + block.start
        yield left[left != right], right[left != right]
