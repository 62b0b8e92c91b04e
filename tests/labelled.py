"""Datasets of invented vectors, which no network made, as a finished run has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tables import listed

from resfeat.backbones.weights import resolve
from resfeat.dataset import Layout, Part, Record, Row, embeddings_schema
from resfeat.plan import read_shard, write_plan
from resfeat.sources import Item
from resfeat.spec import FeatureSpec, Identity, SourceOptions

LABEL = "label"


@cache
def identity_of(weights: str, layers: tuple[str, ...] | None) -> Identity:
    return resolve(FeatureSpec(model="cifar_resnet20", weights=weights, layers=layers)).identity


def invent(
    output: Path, ids: Sequence[str], vectors: Any, *, weights: str = "random:0",
    layers: dict[str, int] | None = None, **columns: Any,
) -> Path:  # fmt: skip
    """A dataset with these ids and vectors [N, D], in shards of 50. layers: D of each, where there
    are several. columns: `label`, or any that is carried."""
    layout, vectors = Layout(output), np.asarray(vectors, np.float32)
    for folder in layout.folders:
        folder.mkdir(parents=True)
    identity = identity_of(weights, tuple(layers) if layers else None)
    labels = columns.pop(LABEL, None)
    carried = [pa.field(name, pa.array(values).type) for name, values in columns.items()]
    taken = list(zip(*(pa.array(each).to_pylist() for each in columns.values()), strict=True))
    rows = {
        key: Row(key, 8, 8, 100, 1, labels[n] if labels is not None else None,
                 taken[n] if taken else ())
        for n, key in enumerate(ids)
    }  # fmt: skip
    items = [Item(key, f"file:///{n}.png", 100, 1) for n, key in enumerate(ids)]
    plan = write_plan(layout.plan, layout.tmp, listed(items), 50)
    options = SourceOptions(label_from="parent" if labels is not None else None)
    Record(identity=identity, weights=weights, sources=("/invented",), source_options=options,
           plan=plan, created="2026-01-01T00:00:00+00:00", versions={"resfeat": "0"},
           ).save(layout)  # fmt: skip
    dims = layers or {identity.layers[0]: vectors.shape[1]}
    schema = embeddings_schema(identity, dims, with_label=labels is not None, carried=carried)
    place = {key: n for n, key in enumerate(ids)}
    for shard in plan.shards.values():
        keys = [item.id for item in read_shard(layout.plan, shard)]
        with Part(layout, shard.number, schema) as part:
            part.add([rows[key] for key in keys], vectors[[place[key] for key in keys]])
            part.commit(keys)
    return output
