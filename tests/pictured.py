"""Datasets of invented rows: as many as are asked for, in moments, with pictures that are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from small import write_pictures
from tables import listed, planned

from resfeat.backbones.weights import resolve
from resfeat.dataset import Dataset, FailedItem, Layout, Part, Record, Row, embeddings_schema
from resfeat.errors import Failure
from resfeat.plan import write_plan
from resfeat.sources import Item
from resfeat.spec import FeatureSpec, SourceOptions

FEW, MANY = 20_000, 200_000
KINDS = 12  # of images: those of a kind are near to each other
FAILED_EVERY = 1000


def invented(once: Callable[..., Path], count: int) -> Path:
    """So many rows and one in FAILED_EVERY that failed, whose files are 40 small pictures."""

    def write(folder: Path) -> None:
        invent(folder / "out", write_pictures(folder / "in", 40), count)

    return once(f"invented-{count}", write) / "out"


def invent(output: Path, pictures: Sequence[Path], count: int, dim: int = 64) -> Dataset:
    """A finished dataset of so many images with labels, whose files are these pictures in turn: in
    KINDS directions, with noise. One in FAILED_EVERY has failed. 30 runs have reports."""
    layout = Layout(output)
    for folder in layout.folders:
        folder.mkdir(parents=True)
    uris = [str(picture) for picture in pictures]
    items = (
        Item(f"folder-{n % 97:02}/IMG_{n:07}.jpg", uris[n % len(uris)], 1000, n,
             label=f"kind {n % KINDS}")
        for n in range(count)
    )  # fmt: skip
    identity = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0")).identity
    record = Record(
        identity=identity, weights="random:0", sources=("/photos",),
        source_options=SourceOptions(label_from="parent"), created="2026-01-01T00:00:00+00:00",
        plan=write_plan(layout.plan, layout.tmp, listed(items), None), versions={"resfeat": "0"},
    )  # fmt: skip
    record.save(layout)
    schema = embeddings_schema(identity, {"avgpool": dim}, with_label=True)
    chance = np.random.default_rng(0)
    kinds = 2 * chance.standard_normal((KINDS, dim), np.float32)
    for shard in record.plan.shards:
        _write(layout, shard, schema, kinds)
    _report(layout, count)
    return Dataset(layout, record)


def _write(layout: Layout, shard: int, schema, kinds) -> None:
    items = planned(layout, shard)
    rows = [Row(item.id, 64, 64, 1000, item.mtime, item.label) for item in items]
    images: list[Row | FailedItem] = [
        FailedItem(item.id, item.uri, Failure("decode", "truncated", f"cut off: {item.id}"))
        if item.mtime % FAILED_EVERY == 7 else row
        for item, row in zip(items, rows, strict=True)
    ]  # fmt: skip
    near = np.array([item.mtime % KINDS for item in items])
    noise = np.random.default_rng(shard).standard_normal((len(items), kinds.shape[1]), np.float32)
    with Part(layout, shard, schema) as part:
        part.add(images, kinds[near] + 2 * noise)
        part.commit(item.id for item in items)


def _report(layout: Layout, count: int) -> None:
    """A run a day, of which each did a 30th."""
    for day in range(30):
        at = datetime(2026, 1, 1, 3, tzinfo=UTC) + timedelta(days=day)
        workers, rate = 1 + day % 4, 100.0 + 7 * (day % 5)
        told = {
            "run_id": f"{at:%Y%m%dT%H%M%SZ}-{day:04x}", "status": "finished",
            "images": count // 30, "images_failed": 3, "seconds": count / 30 / rate,
            "images_per_second": rate, "engine": {"workers": workers, "device": "cpu"},
            "course": {str(n): [rate / workers * (1 + n / 50)] * 40 for n in range(1, 1 + workers)},
            "stages": {"read": 10.0, "decode": 80.5, "embed": 300.0, "write": 2.0, "wait": 12.0},
            "verdict": "limited by: embed (the model waited 4% of its time); faster with a GPU",
            "notes": [], "update": {"added": 1} if day else None, "error": None,
        }  # fmt: skip
        layout.run_report(told["run_id"]).write_text(json.dumps(told))
