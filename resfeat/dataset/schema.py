"""The columns of a dataset, and the rows that fill them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from resfeat.errors import Failure
from resfeat.spec import Identity

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
