"""Parts: the Arrow schema of the rows, and the atomic commit of a shard.

A shard becomes visible whole or not at all, in these steps:

    written     its rows are in drafts, outside the folders that readers glob
    checked     the drafts were opened again: one row for each item of the plan
    withdrawn   where the shard is done once more for its failures: what was committed is set aside,
                in `replaced/`, and the shard counts as not done until the last step
    failures    the failure rows are in place, or gone where there are none
    checksums   the digests of both files are
    embeddings  the embeddings are: this is the commit
    tidied      what was set aside is removed

Each is durable before the next one begins. Part names depend on the shard alone, so a second
attempt replaces its twin with the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.dataset.documents import read_json, write_json
from resfeat.dataset.layout import Layout
from resfeat.dataset.schema import FAILURES, FailedItem, Row
from resfeat.errors import ResfeatError
from resfeat.storage import (
    Draft,
    Location,
    draft,
    make_folder,
    open_parquet,
    remove,
    rename,
    sha256,
)

Step = Literal["written", "checked", "withdrawn", "failures", "checksums", "embeddings", "tidied"]
STEPS: tuple[Step, ...] = get_args(Step)


def on_step(step: Step) -> None:
    """Called after each step of a commit. Does nothing; the tests stop a worker here."""


# Rows are flushed in groups of this many: a bound on memory that leaves groups worth scanning.
ROW_GROUP = 1024


def kept_rows(layout: Layout, shard: int) -> dict[str, tuple[Row, NDArray[np.floating]]]:
    """The rows that a shard has already, by id, each with its layers' embeddings side by side.

    Raises ResfeatError where they are not those that were committed: with the next commit, and its
    checksum, they would pass for them.
    """
    name = layout.part_name(shard)
    for part in (layout.embeddings / name, layout.replaced / name):
        try:
            content = part.read_bytes()
        except FileNotFoundError:
            continue
        noted = digests(layout, shard).get("embeddings")
        try:
            # Not so for what was set aside: what is noted may already be that of its successor.
            if part.parent == layout.embeddings and hashlib.sha256(content).hexdigest() != noted:
                raise pa.ArrowInvalid("it is not what was committed")
            with open_parquet(content) as file:
                return _rows_of(file.read(use_threads=False))
        except (OSError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise ResfeatError(
                f"{part} cannot be kept ({reason}): `resfeat verify --repair` sends what is "
                "damaged back to be done again"
            ) from error
    return {}


def digests(layout: Layout, shard: int) -> dict[str, str]:
    """SHA-256 of a shard's files, `embeddings` and `failures`, as they were noted at its commit;
    nothing where they were not, or the note is damaged."""
    noted: Any = read_json(layout.checksum(shard))
    try:
        return {kind: each["sha256"] for kind, each in noted.items() if each}
    except (AttributeError, KeyError, TypeError):
        return {}


def _rows_of(table: pa.Table) -> dict[str, tuple[Row, NDArray[np.floating]]]:
    layers, plain = [], {}
    for field in table.schema:
        column = table[field.name]
        if pa.types.is_fixed_size_list(field.type):
            values = column.combine_chunks().flatten().to_numpy()
            layers.append(values.reshape(len(table), field.type.list_size))
        else:
            whole = column.cast(pa.int64()) if pa.types.is_timestamp(field.type) else column
            plain[field.name] = whole.to_pylist()
    rows = [Row(*values) for values in zip(*plain.values(), strict=True)]
    return {row.id: (row, vector) for row, vector in zip(rows, np.hstack(layers), strict=True)}


class Part(AbstractContextManager["Part"]):
    """The rows of one shard, on their way into the dataset.

    Left without `commit`, by an exception or otherwise, it leaves nothing behind.
    """

    def __init__(self, layout: Layout, shard: int, schema: pa.Schema) -> None:
        self._layout = layout
        self._shard = shard
        self._name = layout.part_name(shard)
        self._schema = schema
        self._rows: list[Row] = []
        self._vectors: list[NDArray[np.floating]] = []
        self._failures: list[FailedItem] = []
        self._embedded = 0
        self._draft = draft(layout.tmp, self._name)
        self._failures_draft = draft(layout.tmp, f"failures-{self._name}")
        self._writer = pq.ParquetWriter(
            self._draft.sink, schema, compression="zstd", use_dictionary=["label"]
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._writer.close()
        finally:
            self._draft.discard()
            self._failures_draft.discard()

    def add(
        self,
        rows: Sequence[Row],
        vectors: NDArray[np.floating],
        failures: Sequence[FailedItem] = (),
    ) -> None:
        """Append embedded images, `vectors` [len(rows), D] being all their layers side by side, and
        those that failed."""
        self._rows.extend(rows)
        self._vectors.append(vectors)
        self._failures.extend(failures)
        if len(self._rows) >= ROW_GROUP:
            self._flush()

    def commit(self, ids: Iterable[str]) -> None:
        """Make the shard visible, if its rows are exactly one for each of `ids`."""
        self._write()
        on_step("written")
        checksums = self._check(sorted(ids))
        on_step("checked")
        layout = self._layout
        embeddings, failures = layout.embeddings / self._name, layout.failures / self._name
        replaced = layout.replaced / self._name
        if again := embeddings.exists():
            if read_json(layout.checksum(self._shard)) == checksums:
                return  # its twin has done it
            make_folder(replaced.parent)
            rename(embeddings, replaced)
            on_step("withdrawn")
        try:
            self._publish_failures(failures)
        except OSError:
            # It may have been done, and only the answer lost; what is set aside is not lost either.
            if again and _digest(failures) == digests(layout, self._shard).get("failures"):
                rename(replaced, embeddings)
            raise
        on_step("failures")
        write_json(layout, layout.checksum(self._shard), checksums)
        on_step("checksums")
        self._draft.publish(embeddings)
        on_step("embeddings")
        if again or replaced.exists():
            replaced.unlink(missing_ok=True)
            on_step("tidied")

    def _publish_failures(self, target: Location) -> None:
        if self._failures:
            make_folder(target.parent)
            self._failures_draft.publish(target)
        else:  # an earlier attempt may have published some
            remove(target)

    def _write(self) -> None:
        self._flush()
        self._writer.close()
        if self._failures:
            rows = [
                {"id": item.id, "uri": item.uri, **vars(item.failure)} for item in self._failures
            ]
            table = pa.Table.from_pylist(rows, schema=FAILURES)
            pq.write_table(table, self._failures_draft.sink, compression="zstd")

    def _check(self, ids: list[str]) -> dict[str, object]:
        """What the checksums file is to hold, once the drafts hold what they should."""
        embedded = _ids(self._draft, self._embedded)
        failed = _ids(self._failures_draft, len(self._failures)) if self._failures else []
        if sorted([*embedded, *failed]) != ids:
            raise ResfeatError(
                f"{self._name}: its rows do not match the plan; nothing of it was committed. "
                "This is a bug in resfeat: please report it"
            )
        return {
            "embeddings": {"rows": len(embedded), "sha256": sha256(self._draft)},
            "failures": {"rows": len(failed), "sha256": sha256(self._failures_draft)}
            if failed
            else None,
        }

    def _flush(self) -> None:
        if not self._rows:
            return
        rows, vectors = self._rows, np.concatenate(self._vectors)
        columns: dict[str, pa.Array] = {}
        start = 0
        for name, kind in zip(self._schema.names, self._schema.types, strict=True):
            if pa.types.is_fixed_size_list(kind):
                values = vectors[:, start : start + kind.list_size].reshape(-1)
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind)
                start += kind.list_size
            else:
                columns[name] = pa.array([getattr(row, name) for row in rows], kind)
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._embedded += len(rows)
        self._rows, self._vectors = [], []


def _digest(location: Location) -> str | None:
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
