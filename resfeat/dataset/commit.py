"""The rows of a shard: written to drafts as they come, and then committed in one atomic step.

A shard that is new becomes visible whole or not at all. Of one that is done once more (for its
failures, or by an update), both files are replaced in one step each, so that neither is ever
missing. The steps, each durable before the next one begins:

    written     its rows are in drafts, outside the folders that readers glob
    checked     the drafts were opened again: one row for each item of the plan
    noted       the note is in place, with the digests of the new files and of those they replace
    failures    the failure rows are in place, or gone where there are none
    embeddings  the embeddings are: of a new shard, this is the commit
    settled     (of a shard that was replaced) the note names the new files only

A replacement puts the embeddings in place before the failures: what was an embedding stays one at
every moment. Until it is settled the shard counts as unfinished and keeps all its rows. Part names
depend on the shard alone, so a second attempt replaces its twin with the same rows.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.dataset.layout import Layout
from resfeat.dataset.notes import Note
from resfeat.dataset.schema import FailedItem, Row, failures_table, plain_columns
from resfeat.errors import ResfeatError
from resfeat.storage import Draft, Location, draft, make_folder, remove, sha256

Step = Literal["written", "checked", "noted", "failures", "embeddings", "settled"]
STEPS: tuple[Step, ...] = get_args(Step)


def on_step(step: Step) -> None:
    """Called after each step of a commit. Does nothing; the tests stop a worker here."""


# Rows are flushed in groups of this many: a bound on memory that leaves groups worth scanning.
ROW_GROUP = 1024


class Part(AbstractContextManager["Part"]):
    """The rows of one shard, on their way into the dataset.

    schema: of the embeddings, as `embeddings_schema` makes it; the columns behind its own ones are
    carried, and stand in the failures, too. generation: of the plan that lists it. Left without
    `commit`, by an exception or otherwise, it leaves nothing behind.
    """

    def __init__(self, layout: Layout, shard: int, schema: pa.Schema, generation: int = 0) -> None:
        self._layout = layout
        self._shard = shard
        self._generation = generation
        self._name = layout.part_name(shard)
        self._schema = schema
        self._rows: list[Row] = []
        self._vectors: list[NDArray[np.floating]] = []
        self._tables: list[pa.Table] = []  # rows before those
        self._waiting = 0  # rows in all of these
        self._failures: list[FailedItem] = []
        self._embedded = 0
        self._draft = draft(layout.tmp, self._name)
        self._failures_draft = draft(layout.tmp, f"failures-{self._name}")
        plain = list(plain_columns((), schema))
        # Embeddings are noise to a compressor: zstd saves 9 % and makes reading them 1.8 times
        # slower. Their least and largest values tell nobody anything.
        self._writer = pq.ParquetWriter(
            self._draft.sink,
            schema,
            compression=dict.fromkeys(plain, "zstd"),
            use_dictionary=["label"],
            write_statistics=plain,
        )

    def __exit__(self, *_: object) -> None:
        try:
            self._writer.close()
        finally:
            self._draft.discard()
            self._failures_draft.discard()

    def add(self, images: Sequence[Row | FailedItem], vectors: NDArray[np.floating]) -> None:
        """Append images, `vectors` [len(images), D] being all their layers side by side; those of
        images that failed are passed over."""
        rows = [image for image in images if isinstance(image, Row)]
        if len(rows) < len(images):
            self._failures += [image for image in images if isinstance(image, FailedItem)]
            vectors = vectors[[isinstance(image, Row) for image in images]]
        self._rows += rows
        self._vectors.append(vectors)
        self._wait(len(rows))

    def keep(self, rows: pa.Table, failures: Sequence[FailedItem]) -> None:
        """Append what was committed before, `rows` as they stand in a part."""
        self._failures += failures
        self._to_table()
        for start in range(0, len(rows), ROW_GROUP):
            self._tables.append(rows.slice(start, ROW_GROUP))
            self._wait(len(self._tables[-1]))

    def commit(self, ids: Iterable[str]) -> None:
        """Make the shard visible, if its rows are exactly one for each of `ids`."""
        self._flush()
        self._writer.close()
        if self._failures:
            table = failures_table(self._failures, self._schema)
            pq.write_table(table, self._failures_draft.sink, compression="zstd")
        on_step("written")
        note = self._check(sorted(ids))
        on_step("checked")
        layout, name = self._layout, self._name
        if is_there := (layout.embeddings / name).exists():
            last = Note.read(layout, self._shard)
            if last == note:
                return  # its twin has done it
            # As they are now: a run may have been killed between one file and the other.
            there = {kind: digest(layout.root / kind / name) for kind in note.digests}
            before = last.generation_of(there["embeddings"]) if last else 0
            replace(note, replaces=there, before=before).write(layout, self._shard)
        else:
            note.write(layout, self._shard)
        on_step("noted")
        publish = [self._publish_failures, self._publish_embeddings]
        for step in reversed(publish) if is_there else publish:
            step()
        if is_there:
            note.write(layout, self._shard)
            on_step("settled")

    def _publish_failures(self) -> None:
        target = self._layout.failures / self._name
        if self._failures:
            make_folder(target.parent)
            self._failures_draft.publish(target)
        elif target.exists():  # of an earlier attempt
            self._layout.fence.check()
            remove(target)
        on_step("failures")

    def _publish_embeddings(self) -> None:
        self._draft.publish(self._layout.embeddings / self._name)
        on_step("embeddings")

    def _check(self, ids: list[str]) -> Note:
        """The note of this commit, once the drafts hold what they should."""
        embedded = _ids(self._draft, self._embedded)
        failed = _ids(self._failures_draft, len(self._failures)) if self._failures else []
        if sorted([*embedded, *failed]) != ids:
            raise ResfeatError(
                f"{self._name}: its rows do not match the plan; nothing of it was committed. "
                "This is a bug in resfeat: please report it"
            )
        digests = {
            "embeddings": sha256(self._draft),
            "failures": sha256(self._failures_draft) if failed else None,
        }
        reasons = Counter[str](item.failure.reason for item in self._failures)
        return Note(len(embedded), digests, dict(reasons), self._generation)

    def _wait(self, rows: int) -> None:
        self._waiting += rows
        if self._waiting >= ROW_GROUP:
            self._flush()

    def _to_table(self) -> None:
        if not self._rows:
            return
        vectors, start = np.concatenate(self._vectors), 0
        columns: dict[str, Any] = {**plain_columns(self._rows, self._schema)}
        for field in self._schema:
            if field.name not in columns:
                end = start + field.type.list_size
                values = pa.array(vectors[:, start:end].reshape(-1))
                columns[field.name] = pa.FixedSizeListArray.from_arrays(values, type=field.type)
                start = end
        self._tables.append(pa.table(columns, schema=self._schema))
        self._rows, self._vectors = [], []

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._to_table()
        self._writer.write_table(pa.concat_tables(self._tables))
        self._embedded += self._waiting
        self._tables, self._waiting = [], 0


def digest(location: Location) -> str | None:
    """SHA-256 of a file, 64 hex digits; None where there is none."""
    try:
        return hashlib.sha256(location.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def _ids(written: Draft, rows: int) -> list[str]:
    """The ids in a finished Parquet file, which must hold `rows` rows."""
    with written.reopen() as content, pq.ParquetFile(content) as file:
        ids: list[str] = file.read(columns=["id"])["id"].to_pylist()
    if len(ids) != rows:
        raise ResfeatError(f"wrote {rows} rows and read {len(ids)}; is the disk full?")
    return ids
