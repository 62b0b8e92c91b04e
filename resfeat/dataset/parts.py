"""The committed parts of a dataset at one moment: what they are, and their rows by place.

What is made of a dataset, such as an index, notes the digests of the parts that it was made of, so
that it is known later which of them have changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.dataset.commit import digest
from resfeat.dataset.layout import Layout
from resfeat.dataset.notes import Note
from resfeat.dataset.reader import SENT_BACK, Dataset, readable
from resfeat.dataset.vectors import vectors_at
from resfeat.errors import ResfeatError
from resfeat.storage import open_parquet

BLOCK = 4096  # rows read at once


def digests_of(layout: Layout) -> dict[int, str]:
    """SHA-256 of the embeddings of each committed shard, by the notes of the commits. A part is
    only read where its note is lost, or a run ended while it was being replaced."""
    found = {}
    for shard in layout.committed():
        note = Note.read(layout, shard)
        sha256 = note.digests["embeddings"] if note and not note.replaces else None
        sha256 = sha256 or digest(layout.embeddings / layout.part_name(shard))
        if sha256:
            found[shard] = sha256
    return found


@dataclass(frozen=True)
class Block:
    """Rows of one part, one after another. start: the place of the first one in the dataset;
    vectors: float32 [n, D]."""

    shard: int
    start: int
    ids: pa.Array
    vectors: NDArray[np.float32]

    @property
    def places(self) -> NDArray[np.int64]:
        return np.arange(self.start, self.start + len(self.ids))


class Parts:
    """The parts as they were when this was made. A row's place is its number in plan order."""

    def __init__(self, dataset: Dataset, layer: str | None = None) -> None:
        """layer: whose vectors are read; the last by default."""
        self._dataset, self._layout, self._layer = dataset, dataset.layout, layer
        self.column = dataset.check_layer(layer)
        self.digests: Mapping[int, str] = digests_of(dataset.layout)
        self.dim = dataset.dim(layer) or 0
        rows = [self._rows_in(shard) for shard in self.digests]
        ends = np.cumsum(rows, dtype=np.int64).tolist()
        self.rows: int = ends[-1] if ends else 0
        self.starts = dict(zip(self.digests, [0, *ends], strict=False))
        self._ends = dict(zip(self.digests, ends, strict=True))

    def _rows_in(self, shard: int) -> int:
        part = self._layout.embeddings / self._layout.part_name(shard)
        with readable(part, SENT_BACK), open_parquet(part) as file:
            return int(file.metadata.num_rows)

    def places_in(self, shard: int) -> NDArray[np.int64]:
        """The places of the rows of a part."""
        return np.arange(self.starts[shard], self._ends[shard])

    def blocks(self, shards: Iterable[int] | None = None, start: int = 0) -> Iterator[Block]:
        """All rows, or those of some shards, in order. start: pass over blocks that end before
        this place."""
        for shard in self.digests if shards is None else shards:
            if self._ends[shard] <= start:
                continue
            place = self.starts[shard]
            for ids, vectors in self._dataset.part(shard, BLOCK, self._layer):
                if place + len(ids) > self._ends[shard]:
                    raise self._changed()
                if place + len(ids) > start:
                    yield Block(shard, place, ids, vectors)
                place += len(ids)
            if place != self._ends[shard]:
                raise self._changed()

    def at(self, places: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """The rows at these places, which ascend. Reads just the row groups that hold them."""
        tables = []
        for shard, start in self.starts.items():
            first, last = np.searchsorted(places, [start, self._ends[shard]])
            if first < last:
                tables += self._some(shard, places[first:last] - start, columns)
        if sum(map(len, tables)) != len(places):
            raise self._changed()
        return pa.concat_tables(tables)

    def vectors_at(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at these places, which ascend, float32 [n, D]."""
        if not len(places):
            return np.empty((0, self.dim), np.float32)
        found = []
        for shard, start in self.starts.items():
            first, last = np.searchsorted(places, [start, self._ends[shard]])
            if first < last:
                part = self._layout.embeddings / self._layout.part_name(shard)
                with readable(part, SENT_BACK):
                    found.append(vectors_at(part, self.column, places[first:last] - start))
        if sum(map(len, found)) != len(places):
            raise self._changed()
        return np.concatenate(found)

    def _some(self, shard: int, rows: NDArray[np.int64], columns: Sequence[str]) -> list[pa.Table]:
        part = self._layout.embeddings / self._layout.part_name(shard)
        tables = []
        with readable(part, SENT_BACK), open_parquet(part) as file:
            start = 0
            for group in range(file.metadata.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                first, last = np.searchsorted(rows, [start, end])
                if first < last:
                    table = file.read_row_group(group, columns=list(columns), use_threads=False)
                    tables.append(table.take(rows[first:last] - start))
                start = end
        return tables

    def check(self) -> None:
        """Raise ResfeatError where the dataset is not what it was any more."""
        if digests_of(self._layout) != self.digests:
            raise self._changed()

    def _changed(self) -> ResfeatError:
        return ResfeatError(
            f"{self._layout.root} changed while it was read: is a run writing there? Give the same "
            "command again when it has ended"
        )
