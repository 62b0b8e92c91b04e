"""How much one driver can keep going: millions of planned images, and workers that do nothing.

    python tests/benchmarks/scale.py [--millions 1 --millions 10]

The listing is invented, the model and the pictures are left out; the plan, the engine on Ray, the
hand-out of shards, the parts with their checks and commits, the report and the resumption are the
real ones. Prints images a second of the run and the peak memory of the driver for each size, and
writes both, with the machine, to SCALE.md beside this file.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, date, datetime
from pathlib import Path

import click
import numpy as np

from resfeat import __version__, plan
from resfeat.backbones.weights import resolve
from resfeat.dataset import Dataset, Layout, Part, Record, Row, embeddings_schema
from resfeat.engines import prepare, start
from resfeat.engines import ray as engine
from resfeat.reporting import Tally, Watch, versions
from resfeat.runtimes.hardware import hardware
from resfeat.sources.directory import TABLE
from resfeat.sources.item import Item, table_of
from resfeat.spec import FeatureSpec, RuntimeOptions, SourceOptions
from resfeat.worker import Job, ShardResult, Task

HERE = Path(__file__).parent
# Short vectors: what is measured is the driver, and not how fast a disk takes the values.
DIMENSIONS = {"avgpool": 8}


class Idle(engine.RayWorker):
    """An actor that reads no image and runs no model, and commits every shard all the same."""

    def start(self, network):
        return __version__, self._process

    def process(self, task, network):
        layout, identity = Layout(self._job.output), self._job.identity
        items, shard = plan.read_shard(layout.plan, task.shard), task.shard.number
        with Part(layout, shard, embeddings_schema(identity, DIMENSIONS, with_label=False)) as part:
            rows = [Row(item.id, 500, 375, item.size, item.mtime) for item in items]
            part.add(rows, np.zeros((len(rows), 8), np.float32))
            part.commit(item.id for item in items)
        return ShardResult(shard, len(items), 0, 0, 0, 1, {"embed": 1e-9})

    def progress(self):
        return {}


def listing(count: int):
    """Invented items, with paths as long as real ones are."""
    for first in range(0, count, TABLE):
        items = []
        for number in range(first, min(first + TABLE, count)):
            name = f"camera-{number // 10_000:05d}/2026-11-21/IMG_{number:09d}.jpg"
            items.append(Item(name, f"file:///data/photos/{name}", 48_213, 1_795_000_000_000_000))
        yield table_of(items)


def simulate(count: int, folder: Path) -> dict[str, float]:
    """Plan so many items, and run them with workers that are idle."""
    layout = Layout(folder)
    for each in layout.folders:
        each.mkdir(parents=True)
    weights = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0"))
    started = time.perf_counter()
    planned = plan.write_plan(layout.plan, layout.tmp, listing(count), None)
    listed = time.perf_counter() - started
    record = Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=(),
        source_options=SourceOptions(),
        plan=planned,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )
    record.save(layout)
    todo = list(planned.shards.values())
    tally = Tally(list(planned.shards.values()), todo, Watch(), time.monotonic())
    engine.RayWorker = Idle  # type: ignore[misc]
    options = RuntimeOptions(workers=2)
    job = Job.of(layout, record, weights.dims)
    with (
        prepare(options) as cluster,
        start(options, job, weights, len(todo), cluster) as running,
    ):
        tally.engine = running.description
        for result in running.run(list(map(Task, todo)), tally.show, lambda: False):
            tally.add(result)
    report = tally.report(Dataset(layout, record), None)
    assert (report.embedded, report.shards_left) == (count, 0)
    return {
        "count": count,
        "shards": len(planned.shards),
        "listed_per_second": count / listed,
        "images_per_second": report.images_per_second,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@click.command()
@click.option("--millions", type=float, multiple=True, default=(1, 10), show_default=True)
@click.option("--one", hidden=True, nargs=2)
def main(millions: tuple[float, ...], one: tuple[str, str] | None) -> None:
    """Simulate runs of so many million images, each in a process of its own."""
    if one:
        print(json.dumps(simulate(int(one[0]), Path(one[1]))))
        return
    text = f"""# One driver, millions of images

`make scale`, {date.today()}: workers without images and without a model, 2 of them on
{hardware()["cpus"]} cores ({hardware()["cpu"]}); real plan, Ray {versions()["ray"]}, commits and report.

| planned images | shards | images/s listed and planned | images/s handed out and committed | peak memory of the driver, MiB |
| ---: | ---: | ---: | ---: | ---: |
"""  # noqa: E501
    for number in millions:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", str(int(number * 1e6)), folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        text += (
            f"| {row['count']:,} | {row['shards']:,} | {row['listed_per_second']:,.0f} "
            f"| {row['images_per_second']:,.0f} | {row['peak_mib']:.0f} |\n"
        )
    print(text)
    (HERE / "SCALE.md").write_text(text)


if __name__ == "__main__":
    main()
