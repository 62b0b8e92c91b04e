"""Ids that are there twice: the first stays, each later one becomes a failure row.

Nothing holds all ids. In a first pass 8 bytes of each are kept, a hash, and hashes that are there
twice tell which ids to look at closely in the second.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.sources.item import BEAT, problem

Hashes = NDArray[np.int64]


def _hashes(ids: pa.ChunkedArray | pa.Array) -> Hashes:
    """Python's own, int64 [len(ids)]. They need not be safe: what looks alike is compared."""
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


class Repeated:
    """The ids that a listing has more than once. every: the hashes of all of them."""

    def __init__(self, every: Sequence[Hashes]) -> None:
        self._all = np.concatenate(every) if every else np.empty(0, np.int64)
        self._all.sort()
        self._twice = np.unique(self._all[1:][self._all[1:] == self._all[:-1]])
        self._met: dict[str, int] = {}

    def resolve(self, table: pa.Table) -> pa.Table:
        """The table with failures in place of items that were there before. Give it all tables, in
        the order of the ids."""
        if not len(self._twice):
            return table
        places = np.flatnonzero(_within(_hashes(table["id"]), self._twice))
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
            if not _within(_hashes(pa.array([free])), self._all)[0]:
                self._met[name] = number
                return free
        raise AssertionError("numbers do not end")


def _within(some: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    """Which of the hashes are among those in order."""
    at = np.searchsorted(ordered, some)
    found: NDArray[np.bool_] = ordered[np.minimum(at, len(ordered) - 1)] == some
    return found


def resolved(
    ids: Iterable[pa.ChunkedArray | pa.Array], tables: Iterable[pa.Table]
) -> Iterator[pa.Table]:
    """The tables of a listing with each id once. ids: all of them, some at a time, in its order;
    after each of these comes an empty table."""
    every = list[Hashes]()
    for some in ids:
        every.append(_hashes(some))
        yield BEAT
    yield from map(Repeated(every).resolve, tables)
