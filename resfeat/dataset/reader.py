"""Reading the rows of a dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.dataset.layout import Layout
from resfeat.dataset.notes import Commits, Note
from resfeat.dataset.record import Record
from resfeat.dataset.schema import FAILURES, FailedItem, failed_items
from resfeat.dataset.vectors import rows_in, rows_of
from resfeat.errors import ResfeatError, UsageError, first_line
from resfeat.plan import changed_since
from resfeat.sources import Item, items_of
from resfeat.storage import Location, dataset_of, open_parquet

# pyarrow.dataset is imported where it is used: it takes pandas with it, half a second.
if TYPE_CHECKING:
    import pyarrow.dataset as ds

    from resfeat.dataset.examples import Examples

SENT_BACK = "`resfeat verify --repair` sends what is damaged back to be done again"


def open_dataset(output: str | os.PathLike[str]) -> Dataset:
    """Open a dataset for reading, finished or not. Raises UsageError where there is none."""
    layout = Layout(output)
    record = Record.load(layout) if str(output) else None
    if record is None:
        raise UsageError(
            f"no resfeat dataset at {layout.root}: make one with `resfeat extract SRC -o OUT`"
        )
    return Dataset(layout, record)


class Dataset:
    """The committed rows of a dataset: `vectors` streams them; `table`, `ids`, `labels` and `torch`
    take what they give into memory. All are in plan order."""

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
        return Commits.of(self.layout, self.record.plan)

    def changes(self, since: int) -> pa.Table:
        """What updates did after this generation of the plan, for whatever follows the dataset: a
        row for each image, with its `id` and the last `change`, "added", "changed" or "removed". So
        put what was added or changed in place of what you may have of it, and drop what was removed
        if you have it. Raises UsageError for a generation that has not been yet."""
        last = self.record.plan.generation
        if not 0 <= since <= last:
            raise UsageError(
                f"since={since}: {self.layout.root} has had {last} updates; give 0 to {last}"
            )
        return changed_since(self.layout.plan, self.record.plan, since)

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
        self.check_layer(layer)
        for shard in self.layout.committed():
            yield from self.part(shard, rows, layer)

    def part(
        self, shard: int, rows: int = 4096, layer: str | None = None
    ) -> Iterator[tuple[pa.Array, NDArray[np.float32]]]:
        """The same of one of the shards that are committed. Several threads may read at once."""
        part = self.layout.embeddings / self.layout.part_name(shard)
        with readable(part, SENT_BACK):
            yield from rows_in(part, self.check_layer(layer), rows)

    def find(
        self,
        ids: Collection[str],
        layer: str | None = None,
        shards: Iterable[int] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Embeddings float32 [D] by id: of those of these ids that have one. shards: look into the
        parts of these alone, which are committed."""
        column, found = self.check_layer(layer), dict[str, NDArray[np.float32]]()
        wanted = pa.array({ids} if isinstance(ids, str) else set(ids), pa.string())
        for shard in self.layout.committed() if shards is None else shards:
            part = self.layout.embeddings / self.layout.part_name(shard)
            with readable(part, SENT_BACK):
                names, vectors = rows_of(part, column, wanted)
            found.update(zip(names.to_pylist(), vectors, strict=True))
            if len(found) == len(wanted):
                break
        return found

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows in plan order, in memory: all columns, or these. Raises UsageError where there
        are no rows yet, or no such column."""
        names = [self.layout.part_name(shard) for shard in self.layout.committed()]
        if not names:
            raise self.empty()
        with readable(self.layout.embeddings, SENT_BACK):
            rows = dataset_of(self.layout.embeddings, names)
            for column in columns or ():
                if column not in rows.schema.names:
                    there = ", ".join(rows.schema.names)
                    more = " (labels come with --label-from parent)" if column == "label" else ""
                    raise UsageError(
                        f"{self.layout.root} has no column '{column}'{more}: give one of {there}"
                    )
            return rows.to_table(columns=columns)

    def empty(self) -> UsageError:
        """What to raise where rows are needed and there are none."""
        root = self.layout.root
        return UsageError(f"{root} has no embeddings yet: see `resfeat status {root}`")

    def rows(self) -> int:
        """How many there are now, whether or not an update has still to come to some."""
        if not self.layout.committed():
            return 0
        with readable(self.layout.embeddings, SENT_BACK):
            return int(self.embeddings.count_rows())

    def ids(self) -> list[str]:
        """The ids of the rows, in plan order: those of `vectors`."""
        ids: list[str] = self.table(["id"])["id"].to_pylist()
        return ids

    def labels(self, column: str = "label") -> list[Any]:
        """The labels of the rows, in plan order, or another column of theirs; None where one has
        none. Raises UsageError where there is no such column."""
        labels: list[Any] = self.table([column])[column].to_pylist()
        return labels

    def torch(self, label: str | None = "label", layer: str | None = None) -> Examples:
        """The rows as a `torch.utils.data.Dataset`, in memory: 4 D bytes a row. Row n is its
        embedding, a float32 tensor [D], and the number of its label among `classes`; with
        label=None the embedding alone. Raises UsageError where there is no such column or layer,
        and where a row has no label."""
        from resfeat.dataset.examples import Examples

        return Examples.of(self, label, layer)

    def layer_of(self, asked: str | None) -> str:
        """The layer that is asked for, or the last one. Raises UsageError where it is not there."""
        identity = self.record.identity
        if asked is None:
            return identity.last_layer
        if asked not in identity.layers:
            known = ", ".join(identity.layers)
            raise UsageError(f"{self.layout.root} has no layer '{asked}': give one of {known}")
        return asked

    def check_layer(self, layer: str | None) -> str:
        """The column of a layer, or of the last one. Raises UsageError where it is not there."""
        return self.record.identity.columns[self.layer_of(layer)]

    def dim(self, layer: str | None = None) -> int | None:
        """D, the length of a layer's embeddings; None where there are none yet."""
        column = self.check_layer(layer)
        for shard in self.layout.committed():
            part = self.layout.embeddings / self.layout.part_name(shard)
            with readable(part, SENT_BACK), open_parquet(part) as file:
                length: int = file.schema_arrow.field(column).type.list_size
                return length
        return None

    def items(self, ids: Sequence[str]) -> dict[str, Item]:
        """The images with these ids, as they are listed now."""
        import pyarrow.compute as pc

        wanted, record = pc.field("id").isin(list(ids)), Record.load(self.layout) or self.record
        with readable(self.layout.plan, "bring it back from a copy"):
            there = dataset_of(self.layout.plan, [file.name for file in record.plan.files])
            found = there.to_table(filter=wanted).sort_by("since")
        # Of a shard that was listed anew the rows of before may still be in a file of the plan.
        rows = zip(items_of(found), found["change"].to_pylist(), strict=True)
        latest = {item.id: (item, change) for item, change in rows}
        return {key: item for key, (item, change) in latest.items() if change != "removed"}


@dataclass(frozen=True)
class Kept:
    """What a shard has already. rows: the places of its ids in `table`, which is all that is in its
    part; failures: by id. generation: of the plan, when that was done."""

    rows: Mapping[str, int]
    failures: Mapping[str, FailedItem]
    generation: int = 0
    table: pa.Table = None

    def of(self, item: Item, *, retry: bool) -> int | FailedItem | None:
        """What stays of an item when its shard is done once more, its row by its place or its
        failure: whatever was made of it as it is listed now, but for failures that are to be tried
        again."""
        if item.since > self.generation:
            return None
        if (place := self.rows.get(item.id)) is not None:
            return place
        return None if retry else self.failures.get(item.id)


def kept_rows(layout: Layout, shard: int) -> Kept:
    """What a shard has already, nothing where it has no part.

    Raises ResfeatError where that is not what was committed: with the next commit, and its note, it
    would pass for it. Failures are left out where a run ended while it replaced them.
    """
    part, failures = (
        folder / layout.part_name(shard) for folder in (layout.embeddings, layout.failures)
    )
    note = Note.read(layout, shard)
    content, digest = _committed(part, note, "embeddings")
    if content is None or note is None:
        return Kept({}, {})
    with readable(part, SENT_BACK):
        table = _whole(content)
        rows = {key: place for place, key in enumerate(table["id"].to_pylist())}
    failed: list[FailedItem] = []
    if not note.replaces and (content := _committed(failures, note, "failures")[0]):
        with readable(failures, SENT_BACK):
            failed = failed_items(_whole(content))
    by_id = {each.id: each for each in failed}
    return Kept(rows, by_id, note.generation_of(digest), table)


def _committed(
    part: Location, note: Note | None, kind: str
) -> tuple[bytes, str] | tuple[None, None]:
    """A file of a shard and its digest, None where there is none."""
    with readable(part, SENT_BACK):
        try:
            content = part.read_bytes()
        except FileNotFoundError:
            return None, None
        digest = hashlib.sha256(content).hexdigest()
        if not note or digest not in note.allows(kind):
            raise pa.ArrowInvalid("it is not what was committed")
        return content, digest


def _whole(content: bytes) -> pa.Table:
    with open_parquet(content) as file:
        return file.read(use_threads=False)


@contextmanager
def readable(location: Location, hint: str) -> Iterator[None]:
    """Raise a ResfeatError that names the file and what to do, where it cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise ResfeatError(f"{location} is gone: is a run writing here? Try again") from error
    except (OSError, ValueError, KeyError) as error:  # Arrow's own are of these
        raise ResfeatError(f"{location} cannot be read ({first_line(error)}): {hint}") from error
