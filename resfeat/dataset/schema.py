"""The columns of a dataset, and the rows that fill them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.errors import Failure
from resfeat.spec import Identity

FAILURES = pa.schema(
    pa.field(name, pa.string(), nullable=False)
    for name in ("id", "uri", "stage", "reason", "message")
)
PLAIN = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("size", pa.int64(), nullable=False),
    pa.field("mtime", pa.timestamp("us", tz="UTC")),
    pa.field("label", pa.string()),
)
"""The columns of `embeddings/` but the embeddings themselves, which stand behind the id. The label
is only there where it was asked for, and what is carried follows it. mtime: null where a server
does not tell."""
_CARRIED = b"carried"  # the mark of a column that is carried, which may also be called "label"


@dataclass(frozen=True)
class Row:
    """One embedded image: all its columns but the embedding itself. mtime: microseconds."""

    id: str
    width: int
    height: int
    size: int
    mtime: int | None
    label: str | None = None
    carried: tuple[Any, ...] = ()


@dataclass(frozen=True)
class FailedItem:
    """One image that gave no embedding."""

    id: str
    uri: str
    failure: Failure
    carried: tuple[Any, ...] = ()


def embeddings_schema(
    identity: Identity,
    dims: Mapping[str, int],
    *,
    with_label: bool,
    carried: Sequence[pa.Field] = (),
    measured: Mapping[str, Any] | None = None,
) -> pa.Schema:
    """The columns of `embeddings/`, with the identity as JSON under the metadata key `resfeat`.

    dims: length of each layer's embedding. carried: columns that travel with the images. measured:
    what else the metadata is to say, such as the parity.
    """
    value = pa.field("element", pa.type_for_alias(identity.dtype), nullable=False)
    vectors = (
        pa.field(column, pa.list_(value, dims[layer]), nullable=False)
        for layer, column in identity.columns.items()
    )
    plain = PLAIN[1:] if with_label else PLAIN[1:-1]
    described = {"fingerprint": identity.fingerprint, **identity.as_dict(), **(measured or {})}
    return pa.schema(
        [PLAIN[0], *vectors, *plain, *(field.with_metadata({_CARRIED: ""}) for field in carried)],
        metadata={"resfeat": json.dumps(described, sort_keys=True)},
    )


def carried_fields(schema: pa.Schema) -> list[pa.Field]:
    """The columns of `embeddings/` that are carried."""
    return [field for field in schema if _CARRIED in (field.metadata or {})]


def _own_names(schema: pa.Schema) -> list[str]:
    carried = {field.name for field in carried_fields(schema)}
    return [field.name for field in PLAIN if field.name in {*schema.names} - carried]


def plain_columns(rows: Sequence[Row], schema: pa.Schema) -> dict[str, list[Any]]:
    """The columns of rows by name, without the embeddings."""
    own = _own_names(schema)
    columns = {name: [getattr(row, name) for row in rows] for name in own}
    for place, field in enumerate(carried_fields(schema)):
        columns[field.name] = [row.carried[place] for row in rows]
    return columns


def layers_in(table: pa.Table, columns: Iterable[str]) -> list[NDArray[np.floating]]:
    """The embeddings in these columns, [rows, D] each."""
    arrays = [table[column].combine_chunks() for column in columns]
    return [
        array.flatten().to_numpy().reshape(len(table), array.type.list_size) for array in arrays
    ]


def failed_items(table: pa.Table) -> list[FailedItem]:
    """The inverse of `failures_table`."""
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return [FailedItem(row[0], row[1], Failure(*row[2:5]), row[5:]) for row in rows]


def failures_table(items: Iterable[FailedItem], schema: pa.Schema) -> pa.Table:
    """The rows of `failures/`. schema: that of the embeddings, for what is carried."""
    rows = [(item.id, item.uri, *vars(item.failure).values(), *item.carried) for item in items]
    fields = [*FAILURES, *carried_fields(schema)]
    columns = zip([field.name for field in fields], zip(*rows, strict=True), strict=True)
    return pa.table(dict(columns), schema=pa.schema(fields))


def vector_hashes(vectors: NDArray[np.floating]) -> NDArray[np.uint64]:
    """Of each row's bits: a sum with fixed odd random factors, modulo 2^64."""
    bits = vectors.view(f"u{vectors.itemsize}").astype(np.uint64)
    factors = np.random.default_rng(0).integers(2**63, size=bits.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):
        return bits @ (2 * factors + 1)
