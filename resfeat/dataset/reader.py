"""Reading the rows of a dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.dataset.layout import Layout
from resfeat.dataset.notes import Commits, Note
from resfeat.dataset.record import Record
from resfeat.dataset.schema import FAILURES, Row, layers_in, plain_rows
from resfeat.errors import ResfeatError, UsageError, first_line
from resfeat.sources import Item, items_of
from resfeat.storage import Location, dataset_of, open_parquet

# pyarrow.dataset is imported where it is used: it takes pandas with it, half a second.
if TYPE_CHECKING:
    import pyarrow.dataset as ds

SENT_BACK = "`resfeat verify --repair` sends what is damaged back to be done again"


def open_dataset(output: str | os.PathLike[str]) -> Dataset:
    """Open a dataset for reading, finished or not. Raises UsageError where there is none."""
    layout = Layout(output)
    record = Record.load(layout) if str(output) else None
    if record is None:
        raise UsageError(
            f"no resfeat dataset at {layout.root}: make one with `resfeat extract SRC -o {output}`"
        )
    return Dataset(layout, record)


class Dataset:
    """The committed rows of a dataset, streamed."""

    def __init__(self, layout: Layout, record: Record) -> None:
        self.layout = layout
        self.record = record

    @property
    def embeddings(self) -> ds.Dataset:
        """The embedded images, as a `pyarrow.dataset`."""
        return dataset_of(self.layout.embeddings)

    @property
    def failures(self) -> ds.Dataset:
        """The images that gave no embedding, as a `pyarrow.dataset`."""
        import pyarrow.dataset as ds

        if self.layout.with_failures():
            return dataset_of(self.layout.failures)
        return ds.dataset(FAILURES.empty_table())

    def commits(self) -> Commits:
        """What is committed by now, by the notes of the commits."""
        return Commits.of(self.layout)

    def runs(self) -> list[Location]:
        """The reports of the runs that wrote it, the oldest first; none where they were removed."""
        try:
            return sorted(self.layout.runs.iterdir(), key=lambda report: report.name)
        except FileNotFoundError:
            return []

    def vectors(
        self, rows: int = 4096, layer: str | None = None
    ) -> Iterator[tuple[pa.Array, NDArray[np.float32]]]:
        """Ids and embeddings float32 [n, D] of a layer, n at most `rows`, in plan order.

        layer: the last one where it is not given. Raises UsageError for one that is not there.
        """
        column = self.check_layer(layer)
        for shard in self.layout.committed():
            part = self.layout.embeddings / self.layout.part_name(shard)
            with readable(part, SENT_BACK), open_parquet(part) as file:
                for batch in file.iter_batches(rows, columns=["id", column], use_threads=False):
                    flat = batch[column].flatten().to_numpy().astype(np.float32, copy=False)
                    yield batch["id"], flat.reshape(batch.num_rows, -1)

    def check_layer(self, layer: str | None) -> str:
        """The column of a layer, or of the last one. Raises UsageError where it is not there."""
        columns = self.record.identity.columns
        if layer is not None and layer not in columns:
            raise UsageError(
                f"{self.layout.root} has no layer '{layer}': give one of {', '.join(columns)}"
            )
        return columns[layer or list(columns)[-1]]

    def items(self, ids: Sequence[str]) -> dict[str, Item]:
        """The images with these ids, as they were listed."""
        import pyarrow.compute as pc

        plan, wanted = self.layout.plan, pc.field("id").isin(list(ids))

        with readable(plan, "bring it back from a copy"):
            found = dataset_of(plan).to_table(filter=wanted)
        return {item.id: item for item in items_of(found)}


def kept_rows(layout: Layout, shard: int) -> dict[str, tuple[Row, NDArray[np.floating]]]:
    """The rows that a shard has already, by id, each with its layers' embeddings side by side.

    Raises ResfeatError where they are not those that were committed: with the next commit, and its
    note, they would pass for them.
    """
    part = layout.embeddings / layout.part_name(shard)
    note = Note.read(layout, shard)
    with readable(part, SENT_BACK):
        try:
            content = part.read_bytes()
        except FileNotFoundError:
            return {}
        if not note or hashlib.sha256(content).hexdigest() not in note.allows("embeddings"):
            raise pa.ArrowInvalid("it is not what was committed")
        with open_parquet(content) as file:
            table = file.read(use_threads=False)
    columns = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    rows = zip(plain_rows(table), np.hstack(layers_in(table, columns)), strict=True)
    return {row.id: (row, vector) for row, vector in rows}


@contextmanager
def readable(location: Location, hint: str) -> Iterator[None]:
    """Raise a ResfeatError that names the file and what to do, where it cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise ResfeatError(f"{location} is gone: is a run writing here? Try again") from error
    except (OSError, ValueError, KeyError) as error:  # Arrow's own are of these
        raise ResfeatError(f"{location} cannot be read ({first_line(error)}): {hint}") from error
