"""Reading datasets in tests: the rows with pyarrow alone, the plan with our own reader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from resfeat.dataset import FailedItem, Layout, Part, Record, Row
from resfeat.plan import read_shard
from resfeat.sources import Item, table_of


def listed(items: Iterable[Item], carried: Sequence[pa.Field] = ()) -> Iterator[pa.Table]:
    """Items as a listing gives them, some at a time."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, 100)):
        yield table_of(some, carried)


def rows(output: Path, kind: str = "embeddings") -> pa.Table:
    """All rows of a dataset's folder, by id."""
    return ds.dataset(output / kind, format="parquet").to_table().sort_by("id")


def vectors(table: pa.Table) -> NDArray[np.float32]:
    """The embeddings of rows as an array [N, D]."""
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(table), -1)


def add(part: Part, rows: Sequence[Row], made: NDArray, failed: Sequence[FailedItem] = ()) -> None:
    """Rows with vectors [len(rows), D], and failures, which have none, to a part."""
    none = np.zeros((len(failed), made.shape[1]), made.dtype)
    part.add([*rows, *failed], np.concatenate([made, none]))


def planned(layout: Layout, shard: int) -> list[Item]:
    """The items of a shard, as they were listed."""
    return read_shard(layout.plan, Record.load(layout).plan.shards[shard])
