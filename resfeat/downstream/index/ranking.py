"""The rows of an index; and what it found, compared once more by the vectors themselves, or put in
the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.downstream.search import Metric, Neighbours, rank
from resfeat.errors import ResfeatError

if TYPE_CHECKING:
    from resfeat.dataset import Block, Dataset

# What is compared once more at a time: vectors, and pairs of a query and a vector.
RANKED_BYTES, RANKED_PAIRS = 64 << 20, 2 << 20

Places = NDArray[np.int64]
# Gives the vectors float32 [n, D] of rows of an index, which lie in plan order, some at a time.
Read = Callable[[Places], Iterator[NDArray[np.float32]]]

LISTED = pa.schema(
    [
        pa.field("faiss_id", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("hash", pa.uint64(), nullable=False),
    ]
)


class Rows:
    """The rows of `ids.parquet`, as they come."""

    def __init__(self) -> None:
        self._tables = [LISTED.empty_table()]

    def add(
        self, block: Block, start: int, numbers: NDArray[np.int64], hashes: NDArray[np.uint64]
    ) -> None:
        """start: the place of the first row of its part."""
        shards = np.full(len(numbers), block.shard, np.int32)
        rows = (block.places - start).astype(np.int32)
        self._tables.append(pa.table([numbers, block.ids, shards, rows, hashes], schema=LISTED))

    def table(self) -> pa.Table:
        return pa.concat_tables(self._tables)


class Listed:
    """The rows of `ids.parquet`. A place is where a row stands in it."""

    def __init__(self, table: pa.Table) -> None:
        self.ids = table["id"]
        self.numbers: Places = table["faiss_id"].to_numpy()
        self.shards: NDArray[np.int32] = table["shard"].to_numpy()
        self._rows: NDArray[np.int32] = table["row"].to_numpy()

    def places_of(self, numbers: Places) -> Places:
        """Where these of FAISS's numbers stand."""
        return np.searchsorted(self.numbers, numbers)

    def names(self, places: Places) -> NDArray[np.object_]:
        return np.array(self.ids.take(pa.array(places)).to_pylist(), np.object_)

    def by_plan(self, places: Places) -> Places:
        """What sorts these places as the dataset has their rows."""
        order: Places = np.lexsort((self._rows[places], self.shards[places]))
        return order

    def ordered(
        self, scores: NDArray[np.float32], found: Places, metric: Metric
    ) -> tuple[NDArray[np.float32], Places]:
        """Scores and numbers [Q, k] as FAISS gives them, equal ones in plan order, cosines within
        -1 to 1, and distances in place of their squares."""
        scores = np.clip(scores, -1, 1) if metric == "cosine" else np.sqrt(np.maximum(scores, 0))
        places = self.places_of(found)
        nearer = scores if metric == "cosine" else -scores
        keys = self._rows[places], self.shards[places], -nearer
        order = np.lexsort(keys, axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def ranked(
    listed: Listed,
    queries: NDArray[np.float32],
    found: Places,
    k: int,
    metric: Metric,
    read: Read,
) -> Neighbours:
    """The k nearest to each query [Q, D] of the rows that were found for it, numbers [Q, m]; -1 for
    none. Each query has k. read: where the vectors are."""
    parts = []
    some = max(1, RANKED_PAIRS // found.shape[1])
    for start in range(0, len(queries), some):
        of_some = found[start : start + some]
        numbers = np.unique(of_some[of_some >= 0])
        places = listed.places_of(numbers)
        by_plan = listed.by_plan(places)
        own = np.argsort(by_plan)[np.searchsorted(numbers, of_some)]
        own[of_some < 0] = -1
        rows = _named(listed, places[by_plan], read)
        parts.append(rank(queries[start : start + some], own, rows, k, metric))
    return Neighbours(
        np.concatenate([each.ids for each in parts]),
        np.concatenate([each.scores for each in parts]),
    )


def _named(
    listed: Listed, places: Places, read: Read
) -> Iterator[tuple[NDArray[np.object_], NDArray[np.float32]]]:
    start = 0
    for vectors in read(places):
        yield listed.names(places[start : start + len(vectors)]), vectors
        start += len(vectors)


def of_dataset(dataset: Dataset, layer: str, listed: Listed, dim: int) -> Read:
    """Reads vectors in the dataset, part by part."""
    most = max(1, RANKED_BYTES // (4 * dim))

    def read(places: Places) -> Iterator[NDArray[np.float32]]:
        shards = listed.shards[places]
        for of_part in np.split(places, np.flatnonzero(np.diff(shards)) + 1):
            for start in range(0, len(of_part), most):
                some = of_part[start : start + most]
                names = listed.names(some).tolist()
                there = dataset.find(names, layer, [int(listed.shards[some[0]])])
                if len(there) < len(names):
                    raise ResfeatError(
                        f"{dataset.layout.root} changed while it was searched: is a run writing "
                        "there? `resfeat index` brings the index up to date"
                    )
                yield np.stack([there[name] for name in names])

    return read


def of_index(index: Any, listed: Listed, dim: int) -> Read:
    """Takes them from an index that has them whole (flat): for the cosine of length 1, which rounds
    them."""
    most = max(1, RANKED_BYTES // (4 * dim))

    def read(places: Places) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(places), most):
            yield index.reconstruct_batch(listed.numbers[places[start : start + most]])

    return read
