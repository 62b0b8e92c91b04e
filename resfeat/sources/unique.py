"""Ids that are there twice: the first stays, each later one becomes a failure row.

Nothing holds all ids. In a first pass 8 bytes of each are kept, a hash, and hashes that are there
twice tell which ids to look at closely in the second.
"""

from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.sources.item import problem

TOGETHER = 4096  # ids, so that what is computed of them stays in a cache
# Any odd number and any 256: hashes need not be safe, since what looks alike is compared.
_FACTOR = 0x9E3779B97F4A7C15
_LETTERS = np.random.default_rng(0).integers(0, 1 << 64, 256, np.uint64)

Hashes = NDArray[np.uint64]


def hashes(ids: pa.ChunkedArray | pa.Array) -> Hashes:
    """A hash of each of the ids, uint64 [len(ids)]."""
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    every = [_hashes(ids.slice(start, TOGETHER)) for start in range(0, len(ids), TOGETHER)]
    return np.concatenate(every) if every else np.empty(0, np.uint64)


def _hashes(ids: pa.Array) -> Hashes:
    """Sums over the letters of an id, each by a power of the factor, modulo 2**64: differences of
    one running sum."""
    ids = ids.cast(pa.large_string())
    _, places, letters = ids.buffers()
    ends = np.frombuffer(places, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    text = np.frombuffer(letters or b"", np.uint8)[ends[0] : ends[-1]]
    starts = ends - ends[0]
    lengths = np.diff(starts)
    at = np.arange(len(text)) - np.repeat(starts[:-1], lengths)
    powers = np.full(int(lengths.max(initial=0)) + 1, _FACTOR, np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_LETTERS[text] * powers[at])])
    found: Hashes = sums[starts[1:]] - sums[starts[:-1]] + lengths.astype(np.uint64)
    return found


class Repeated:
    """The ids that a listing has more than once. ids: all of them, some at a time, in its order."""

    def __init__(self, ids: Iterable[pa.ChunkedArray | pa.Array]) -> None:
        every = [hashes(some) for some in ids]
        self._all = np.concatenate(every) if every else np.empty(0, np.uint64)
        self._all.sort()
        self._twice = np.unique(self._all[1:][self._all[1:] == self._all[:-1]])
        self._met: dict[str, int] = {}

    def resolve(self, table: pa.Table) -> pa.Table:
        """The table with failures in place of items that were there before. Give it all tables, in
        the order of the ids."""
        if not len(self._twice):
            return table
        places = np.flatnonzero(_within(hashes(table["id"]), self._twice))
        if not len(places):
            return table
        ids = table["id"].to_pylist()
        problems = table["problem"].to_pylist()
        for place in places:
            name = ids[place]
            if name in self._met:
                ids[place] = self._free(name)
                problems[place] = problem("duplicate_id", f"{name} was listed before")
            else:
                self._met[name] = 1
        columns = {"id": ids, "problem": problems}
        for name, values in columns.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(values, pa.string()))
        return table

    def _free(self, name: str) -> str:
        """A name for the next of those that are called so, which no other item has."""
        for number in count(self._met[name] + 1):
            free = f"{name};{number}"
            if not _within(hashes(pa.array([free])), self._all)[0]:
                self._met[name] = number
                return free
        raise AssertionError("numbers do not end")


def _within(some: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    """Which of the hashes are among those in order."""
    at = np.searchsorted(ordered, some)
    found: NDArray[np.bool_] = ordered[np.minimum(at, len(ordered) - 1)] == some
    return found


def resolved(ids: Iterable[pa.Array], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The tables of a listing with each id once."""
    return map(Repeated(ids).resolve, tables)
