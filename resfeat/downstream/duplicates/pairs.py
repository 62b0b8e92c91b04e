"""Which images belong together, being nearer to each other than a threshold: who is linked with
whom, directly or by way of others.

Exact: every pair is compared, a block of rows with all that follow it. By an index: each image with
its nearest; where the index is one of codes, those that may be near enough are compared once more.
Equal vectors are linked by their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from resfeat.dataset import Parts, vector_hashes
from resfeat.downstream.duplicates.links import Links, Places
from resfeat.downstream.index import COARSE, Index, prepared
from resfeat.runtimes.hardware import memory_bytes

# Rows that are held while all that follow are read: each multiple of them costs a reading of what
# is left of the dataset.
HELD_SHARE, HELD_BYTES = 8, 256 << 20
COMPARED = 1024  # rows of those at a time, with a block of a part
# By an index: as many neighbours of each. Of more that are alike others are linked by way of these.
NEIGHBOURS = 32
CHECKED_BYTES = 64 << 20  # of vectors that are compared once more at a time
ROUNDING = 1e-6  # of a cosine in float32

Tell = Callable[[str], None]


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
        pairs = _near_by_index(parts, index, least, hashes, links)
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
    parts: Parts, index: Index, least: float, hashes: NDArray[np.uint64], links: Links
) -> Iterator[tuple[Places, Places]]:
    """Pairs of each image and its nearest. Fills in the hashes. links: of pairs that were given."""
    coarse = COARSE.get(index.about.kind)
    place_of = np.full(len(index.ids), -1, np.int64)  # of each row of the index
    for shard in parts.digests:
        if not len(places := parts.places_in(shard)):
            continue  # all of its images failed
        there, listed = np.flatnonzero(index.shards == shard), index.rows_of(shard)
        at = pc.index_in(parts.at(places, ["id"])["id"], value_set=listed["id"])
        place_of[there[at.to_numpy()]] = places
    for block in parts.blocks():
        hashes[block.places] = vector_hashes(block.vectors)
        units = prepared(block.vectors, "cosine")
        cosines, found = index.nearest(units, NEIGHBOURS + 1)
        bar = np.full((len(units), 1), least)
        if coarse:
            bar = least * cosines.max(axis=1, keepdims=True) - coarse.doubt
        left, column = np.nonzero((cosines >= bar) & (found >= 0))
        right = place_of[index.places_of(found[left, column])]
        is_pair = left + block.start != right
        left, right = left[is_pair], right[is_pair]
        if coarse:
            of_block = units, block.start
            yield from _checked(parts, of_block, (left, right), least, links)
        else:
            yield left + block.start, right


def _checked(
    parts: Parts,
    block: tuple[NDArray[np.float32], int],
    pairs: tuple[Places, Places],
    least: float,
    links: Links,
) -> Iterator[tuple[Places, Places]]:
    """The pairs of a row of a block and an image anywhere whose vectors are near enough. Those that
    are linked already are passed over: where all is near to all, nearly all of them."""
    units, start = block
    order = np.argsort(pairs[1], kind="stable")
    most = max(1, CHECKED_BYTES // (4 * parts.dim))
    for first in range(0, len(order), most):
        left, right = (each[order[first : first + most]] for each in pairs)
        is_apart = links.apart(left + start, right)
        left, right = left[is_apart], right[is_apart]
        places, at = np.unique(right, return_inverse=True)
        others = prepared(parts.vectors_at(places), "cosine")
        is_near = np.einsum("ij,ij->i", units[left], others[at]) >= least
        yield left[is_near] + start, right[is_near]
