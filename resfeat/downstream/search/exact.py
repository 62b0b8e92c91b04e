"""Exact nearest neighbours, streamed over the parts of a dataset on all cores.

Each thread takes the next part, reads it some rows at a time, and multiplies these with all queries
in float32. That is near enough to rule out nearly every row. The few that may be among the nearest
are compared once more in float64, row by row, so that the answer depends neither on the order of a
sum nor on who read which part: equal vectors are equally near, and come in plan order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from resfeat.runtimes.hardware import cpu_count

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

Metric = Literal["cosine", "l2"]

# Rows that a thread has in hand. With fewer products are slower; more take memory that is new each
# time.
ROWS = 1024
# How far a float32 product of D numbers is from the true one, in shares of both lengths times the
# square root of D. With rounding at random 2**-24 is to be expected, and this is many times it.
DOUBT = 16 * 2.0**-24
# Squares of lengths with which float32 can be trusted. Other rows are always compared in float64.
SMALLEST, LARGEST = 1e-30, 1e30
MANY = 2  # times what is asked for: so many are worth a closer look at float32
QUERIES = 4096  # in one pass: more would take memory, and hold up the reading of rows
PAIRS = 256  # compared in float64 at a time
_ROW_BITS = 32


@dataclass(frozen=True)
class Neighbours:
    """The nearest images to each query, nearest first; equally near ones in plan order.

    ids: str [Q, k]. scores: float32 [Q, k], cosines (-1 to 1) or, by "l2", distances. k is what was
    asked for, or all images where there are fewer.
    """

    ids: NDArray[np.object_]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class _Pairs:
    """Queries and rows that may be near them, a pair each. near: larger is nearer. place: of the
    row in the dataset."""

    query: NDArray[np.int64]
    near: NDArray[np.float64]
    place: NDArray[np.int64]
    ids: NDArray[np.object_]

    @classmethod
    def of(cls, several: Sequence[_Pairs]) -> _Pairs:
        columns = zip(*(vars(each).values() for each in several), strict=True)
        return cls(*map(np.concatenate, columns))

    def best(self, k: int) -> _Pairs:
        """The k nearest to each query, queries ascending, the nearest first."""
        order = np.lexsort((self.place, -self.near, self.query))
        query = self.query[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        return _Pairs(*(column[order[rank < k]] for column in vars(self).values()))


_NONE = _Pairs(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), np.empty(0, np.object_))


def scan(
    dataset: Dataset,
    queries: NDArray[np.float32],
    k: int,
    layer: str | None = None,
    metric: Metric = "cosine",
) -> Neighbours:
    """The k nearest of all rows to each query, float32 [Q, D], at least one. It reads every
    embedding once, or once for each `QUERIES`."""
    found = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cpu_count(), "scan") as pool:
        for start in range(0, len(queries), QUERIES):
            shards = iter(dataset.layout.committed())  # the threads share it
            some = [
                _Nearest(queries[start : start + QUERIES], k, metric) for _ in range(cpu_count())
            ]
            look = partial(_look, dataset=dataset, layer=layer, shards=shards)
            try:
                list(pool.map(look, some))
            finally:
                list(shards)  # where one fails, none is left for the others
            found.append(_Pairs.of([each.found for each in some]).best(k))
    return _neighbours(found, len(queries), metric)


def rank(
    queries: NDArray[np.float32],
    own: NDArray[np.int64],
    rows: Iterable[tuple[NDArray[np.object_], NDArray[np.float32]]],
    k: int,
    metric: Metric,
) -> Neighbours:
    """The k nearest to each query [Q, D] of some rows of its own, by the scores of `scan`.

    rows: ids and vectors [n, D], some at a time. own: [Q, m], places in these; -1 for none. Each
    query has k.
    """
    nearest, start, ids, near = _Nearest(queries, k, metric), 0, [], []
    query, column = np.nonzero(own >= 0)
    row = own[query, column]
    order = np.argsort(row, kind="stable")
    query, row = query[order], row[order]
    for names, vectors in rows:
        some = slice(*np.searchsorted(row, [start, start + len(names)]))
        there = row[some] - start
        ids.append(names[there])
        near.append(nearest.compare(query[some], vectors, there))
        start += len(names)
    pairs = _Pairs(query, np.concatenate(near), row, np.concatenate(ids))
    return _neighbours([pairs.best(k)], len(queries), metric)


def _neighbours(found: Sequence[_Pairs], queries: int, metric: Metric) -> Neighbours:
    """What was found for some queries after the others, as many rows for each."""
    scores = np.concatenate([each.near for each in found]) * (1 if metric == "cosine" else -1)
    ids = np.concatenate([each.ids for each in found])
    shape = queries, len(ids) // queries
    return Neighbours(ids.reshape(shape), scores.astype(np.float32).reshape(shape))


def _look(nearest: _Nearest, dataset: Dataset, layer: str | None, shards: Iterator[int]) -> None:
    """Take one of the shards after the other, until others have taken the rest."""
    for shard in shards:
        place = shard << _ROW_BITS
        for ids, rows in dataset.part(shard, ROWS, layer):
            nearest.add(ids, rows, place)
            place += len(rows)


class _Nearest:
    """The nearest of the rows that one thread has seen. Theirs must come in plan order."""

    def __init__(self, queries: NDArray[np.float32], k: int, metric: Metric) -> None:
        self.found = _NONE
        self._k, self._metric = k, metric
        self._queries = queries.astype(np.float64)
        self._lengths = _lengths(self._queries)
        if metric == "cosine":
            self._queries /= np.where(self._lengths, self._lengths, 1)[:, None]
            self._lengths = _lengths(self._queries)
        self._odd = _odd(self._lengths**2) & (self._lengths > 0)
        self._rough = self._queries.astype(np.float32)
        self._least = np.full(len(queries), -np.inf)  # of the k-th that was found

    def add(self, ids: pa.Array, rows: NDArray[np.float32], place: int) -> None:
        """Look at rows [n, D], the first of which has this place."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # what is odd
            query, row = np.nonzero(self._may_be_near(rows))
        if not len(query):
            return
        near = self.compare(query, rows, row)
        # Of equals the first stay: those that are not nearer than the k-th, which came before, go.
        nearer = near > self._least[query]
        query, row, near = query[nearer], row[nearer], near[nearer]
        some, back = np.unique(row, return_inverse=True)
        names = np.array(ids.take(pa.array(some)).to_pylist(), np.object_)[back]
        new = _Pairs(query, near, place + row, names)
        self.found = found = _Pairs.of([self.found, new]).best(self._k)
        ends = np.searchsorted(found.query, np.arange(len(self._least)), "right")
        full = np.bincount(found.query, minlength=len(self._least)) == self._k
        self._least[full] = found.near[ends[full] - 1]

    def _may_be_near(self, rows: NDArray[np.float32]) -> NDArray[np.bool_]:
        """[Q, n]: which rows may be among the k nearest."""
        squares = np.einsum("ij,ij->i", rows, rows)
        near = self._rough @ rows.T
        odd = _odd(squares)
        odd[odd] = rows[odd].any(axis=1)  # zeros are well known
        squares[odd] = 0
        doubt = DOUBT * np.sqrt(rows.shape[1])
        if self._metric == "cosine":
            near /= np.sqrt(np.where(squares, squares, 1))
            least = self._least - doubt
        else:
            # |q - x|² is |q|² - 2 (q x - |x|² / 2): the larger that in brackets is, the nearer.
            near -= squares / 2
            longest = np.sqrt(squares.max(initial=0))
            doubt = doubt * longest * (self._lengths + longest)
            least = (self._lengths**2 - self._least**2) / 2 - doubt
        near[:, odd] = -np.inf  # of these nothing is known
        near[self._odd] = -np.inf
        may_be = near >= least.astype(np.float32)[:, None]
        if np.count_nonzero(may_be) > MANY * self._k * len(near) and self._k < len(rows):
            # At first nothing is known; and rows may come the nearer, the later. Then only those
            # that may be among the nearest of these.
            kth = np.partition(near, -self._k, axis=1)[:, -self._k]
            may_be &= near >= (kth - 2 * doubt).astype(np.float32)[:, None]
        may_be[:, odd] = True
        may_be[self._odd] = True
        found: NDArray[np.bool_] = may_be
        return found

    def compare(
        self, query: NDArray[np.int64], rows: NDArray[np.float32], row: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """How near the query is to the row, of each pair; at least one."""
        pieces = (slice(start, start + PAIRS) for start in range(0, len(query), PAIRS))
        return np.concatenate([self._compare(query[some], rows[row[some]]) for some in pieces])

    def _compare(self, query: NDArray[np.int64], rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """The same of a row beside each query."""
        ours, theirs = self._queries[query], rows.astype(np.float64)
        if self._metric == "l2":
            return -_lengths(ours - theirs)
        lengths = _lengths(theirs)
        cosines: NDArray[np.float64] = (ours * theirs).sum(axis=1) / np.where(lengths, lengths, 1)
        return cosines


def _lengths(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    # Sums along each row alone: the same row has the same sum wherever it lies.
    lengths: NDArray[np.float64] = np.sqrt((vectors * vectors).sum(axis=1))
    return lengths


def _odd(squares: NDArray[Any]) -> NDArray[np.bool_]:
    """Of which lengths float32 makes nothing that can be trusted."""
    odd: NDArray[np.bool_] = ~((squares > SMALLEST) & (squares < LARGEST))
    return odd
