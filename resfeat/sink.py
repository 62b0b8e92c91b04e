"""Parts: the Arrow schema of the rows, and the atomic commit of a shard.

A shard becomes visible whole or not at all. Its rows are written to `_resfeat/tmp`, outside the
folders that readers glob; on `commit` the files are re-opened and their rows checked, flushed to
the disk, and renamed into place: failures first, embeddings last, since the embeddings part is the
commit. Part names depend on the shard alone, so a second attempt replaces its twin with the same
rows.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.errors import Failure, ResfeatError
from resfeat.layout import Layout
from resfeat.spec import Identity

# Rows are flushed in groups of this many: a bound on memory that leaves groups worth scanning.
ROW_GROUP = 1024

FAILURES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


def embeddings_schema(
    identity: Identity,
    dims: Mapping[str, int],
    *,
    with_label: bool,
    parity: Mapping[str, float] | None = None,
    quantised: str | None = None,
) -> pa.Schema:
    """The columns of `embeddings/`, with the identity as JSON under the metadata key `resfeat`.

    dims: length of each layer's embedding. parity, quantised: as the record has them.
    """
    value = pa.field("element", pa.type_for_alias(identity.dtype), nullable=False)
    fields = [
        pa.field("id", pa.string(), nullable=False),
        *(
            pa.field(column, pa.list_(value, dims[layer]), nullable=False)
            for layer, column in identity.columns.items()
        ),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
    if with_label:
        fields.append(pa.field("label", pa.string()))
    described = {"fingerprint": identity.fingerprint, **identity.as_dict()}
    if parity:
        described["parity"] = dict(parity)
    if quantised:
        described["quantised"] = quantised
    return pa.schema(fields, metadata={"resfeat": json.dumps(described, sort_keys=True)})


@dataclass(frozen=True)
class Row:
    """One embedded image: all its columns but the embedding itself."""

    id: str
    width: int
    height: int
    size: int
    mtime: int
    label: str | None = None


@dataclass(frozen=True)
class FailedItem:
    """One image that gave no embedding."""

    id: str
    uri: str
    failure: Failure


class Part(AbstractContextManager["Part"]):
    """The rows of one shard, on their way into the dataset.

    Left without `commit`, by an exception or otherwise, it leaves nothing behind.
    """

    def __init__(self, layout: Layout, shard: int, schema: pa.Schema) -> None:
        self._layout = layout
        self._name = layout.part_name(shard)
        self._schema = schema
        self._rows: list[Row] = []
        self._vectors: list[NDArray[np.floating]] = []
        self._failures: list[FailedItem] = []
        self._embedded = 0
        # Unique, so that a worker thought dead and its successor never write to one file.
        attempt = uuid.uuid4().hex[:12]
        self._temporary = layout.tmp / f"{attempt}-{self._name}"
        self._temporary_failures = layout.tmp / f"{attempt}-failures-{self._name}"
        self._writer = pq.ParquetWriter(
            self._temporary, schema, compression="zstd", use_dictionary=["label"]
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
            self._temporary.unlink(missing_ok=True)
            self._temporary_failures.unlink(missing_ok=True)

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
        self._flush()
        self._writer.close()
        failed = [item.id for item in self._failures]
        if failed:
            rows = [
                {"id": item.id, "uri": item.uri, **vars(item.failure)} for item in self._failures
            ]
            table = pa.Table.from_pylist(rows, schema=FAILURES)
            pq.write_table(table, self._temporary_failures, compression="zstd")
            _check(self._temporary_failures, len(failed))
        embedded = _check(self._temporary, self._embedded)
        if sorted([*embedded, *failed]) != sorted(ids):
            raise ResfeatError(
                f"{self._name}: its rows do not match the plan; nothing of it was committed. "
                "This is a bug in resfeat: please report it"
            )
        target = self._layout.failures / self._name
        if failed:
            target.parent.mkdir(exist_ok=True)
            publish(self._temporary_failures, target)
        else:  # an earlier attempt may have published failures and died before its commit
            target.unlink(missing_ok=True)
        publish(self._temporary, self._layout.embeddings / self._name)

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


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished file into place so that it survives a power cut."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: object) -> None:
    """Write a small JSON document atomically."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check(path: Path, rows: int) -> list[str]:
    """The ids in a closed Parquet file, which must hold `rows` rows."""
    with pq.ParquetFile(path) as file:
        ids: list[str] = file.read(columns=["id"])["id"].to_pylist()
    if len(ids) != rows:
        raise ResfeatError(f"{path}: wrote {rows} rows and read {len(ids)}; is the disk full?")
    return ids
