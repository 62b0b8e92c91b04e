"""Datasets of vectors that no image has: written in a moment, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tables import add, listed

from resfeat.backbones.weights import resolve
from resfeat.dataset import Dataset, Layout, Part, Record, Row, embeddings_schema, open_dataset
from resfeat.plan import write_plan
from resfeat.sources import Item
from resfeat.spec import FeatureSpec, Identity, SourceOptions

Vectors = NDArray[np.float32]


class Sliced(Protocol):
    """Vectors [N, D], or what makes them some at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, some: slice, /) -> Vectors: ...


@cache
def identity() -> Identity:
    return resolve(FeatureSpec(model="cifar_resnet20", weights="random:0")).identity


def clustered(rows: int, dim: int, *, seed: int = 0, spread: float = 0.5) -> Vectors:
    """A mixture, as embeddings are: about 50 rows around each of many centres. In noise without
    any, everything is as far from everything, and no index could find what is near."""
    chance = np.random.default_rng(seed)
    centres = chance.standard_normal((max(2, rows // 50), dim))
    near = centres[chance.integers(len(centres), size=rows)]
    return (near + spread * chance.standard_normal((rows, dim))).astype(np.float32)


def write_dataset(
    root: Path, vectors: Sliced, ids: Sequence[str] | None = None, shard_size: int = 100
) -> Dataset:
    """A finished dataset of vectors [N, D]."""
    layout, names = Layout(root), ids or [f"{n:06}.jpg" for n in range(len(vectors))]
    for folder in layout.folders:
        folder.mkdir(parents=True)
    items = [Item(name, f"/photos/{name}", 1000, 0) for name in names]
    plan = write_plan(layout.plan, layout.tmp, listed(items), shard_size)
    Record(
        identity=identity(), weights="random:0", sources=("/photos",), plan=plan,
        source_options=SourceOptions(), created="2026-01-01T00:00:00+00:00",
        versions={"resfeat": "0"},
    ).save(layout)  # fmt: skip
    for shard in plan.shards:
        some = slice(shard * shard_size, (shard + 1) * shard_size)
        commit(layout, shard, names[some], vectors[some])
    return open_dataset(root)


def commit(
    layout: Layout,
    shard: int,
    ids: Sequence[str],
    vectors: Vectors,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Commit a shard, once more if it is there, with these rows. sizes: width and height."""
    schema = embeddings_schema(identity(), {"avgpool": vectors.shape[1]}, with_label=False)
    pictures = sizes or [(640, 480)] * len(ids)
    rows = [Row(name, *size, 1000, 0) for name, size in zip(ids, pictures, strict=True)]
    with Part(layout, shard, schema) as part:
        add(part, rows, vectors)
        part.commit(ids)
