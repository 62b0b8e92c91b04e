"""How much one driver can keep going: millions of planned images, and workers that do nothing.

    python tests/benchmarks/scale.py [--millions 1 --millions 10]

The listing is invented, the model and the pictures are left out; the plan, the engine on Ray, the
hand-out of shards, the parts with their checks and commits, and the report are the real ones. Then
`extract` resumes the finished dataset and `status` looks at it, as commands of their own. Prints
images a second of the run, seconds of each command and every peak of memory, for each size, and
writes them, with the machine, to SCALE.md beside this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from resfeat import __version__, plan
from resfeat.backbones.weights import resolve
from resfeat.dataset import Dataset, Layout, Part, Record, Row, embeddings_schema
from resfeat.engines import prepare, start
from resfeat.engines import ray as engine
from resfeat.reporting import Tally, Watch, versions
from resfeat.runtimes.hardware import hardware
from resfeat.sources.directory import TABLE
from resfeat.sources.item import schema_of
from resfeat.spec import FeatureSpec, RuntimeOptions, SourceOptions
from resfeat.worker import Job, ShardResult, Task

HERE = Path(__file__).parent
# Short vectors: what is measured is the driver, and not how fast a disk takes the values.
DIMENSIONS = {"avgpool": 8}
COMMAND = """
from resfeat.cli import main
try:
    main()
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(status["VmHWM"].split()[0]) / 1024)
"""
MODEL = {"model": "cifar_resnet20", "weights": "random:0"}


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


def listing(count: int) -> Iterator[pa.Table]:
    """Invented items, with paths as long as real ones are; in columns, as folders are listed."""
    for first in range(0, count, TABLE):
        numbers = range(first, min(first + TABLE, count))
        names = pa.array([f"camera-{n // 10_000:05d}/2026-11-21/IMG_{n:09d}.jpg" for n in numbers])
        known = {
            "id": names,
            "uri": pc.binary_join_element_wise("file:///data/photos/", names, ""),
            "size": pa.repeat(48_213, len(numbers)),
            "mtime": pa.repeat(1_795_000_000_000_000, len(numbers)),
        }
        columns = [
            known.get(field.name, pa.nulls(len(numbers))).cast(field.type) for field in schema_of()
        ]
        yield pa.table(columns, schema_of())


def simulate(count: int, source: Path, output: Path) -> dict[str, float]:
    """Plan so many items, and run them with workers that are idle. source: where they would be."""
    layout = Layout(output)
    for each in layout.folders:
        each.mkdir(parents=True)
    weights = resolve(FeatureSpec(**MODEL))
    started = time.perf_counter()
    planned = plan.write_plan(layout.plan, layout.tmp, listing(count), None)
    listed = time.perf_counter() - started
    record = Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=(str(source),),
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
        "peak_mib": peak_mib(),
    }


def looked_at(count: int, source: Path, output: Path) -> dict[str, float]:
    """What it takes to see that all is done: for `extract`, which resumes, and for `status`."""
    resume = ["extract", str(source), "-o", str(output), "--log-json", "--workers", "2"]
    for name, value in MODEL.items():
        resume += [f"--{name}", value]
    told, seconds, peak = timed(*resume)
    assert (told["status"], told["embedded"], told["shards"]) == ("finished", count, 0)
    found = {"resume_seconds": seconds, "resume_mib": peak}
    told, seconds, peak = timed("status", str(output), "--json")
    assert (told["complete"], told["embedded"]) == (True, count)
    return found | {"status_seconds": seconds, "status_mib": peak}


def timed(*arguments: str) -> tuple[dict[str, Any], float, float]:
    """What a command of resfeat prints in its last line, its seconds, and its peak in MiB."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    *_, told, peak = done.stdout.splitlines()
    return json.loads(told), seconds, float(peak)


def peak_mib() -> float:
    """Of this process. Unlike that of getrusage it does not begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM"].split()[0]) / 1024


@click.command()
@click.option("--millions", type=float, multiple=True, default=(1, 10), show_default=True)
@click.option("--one", hidden=True, nargs=3)
def main(millions: tuple[float, ...], one: tuple[str, str, str] | None) -> None:
    """Simulate runs of so many million images, each in a process of its own."""
    if one:
        print(json.dumps(simulate(int(one[0]), Path(one[1]), Path(one[2]))))
        return
    text = f"""# One driver, millions of images

`make scale`, {date.today()}, resfeat {__version__}: workers without images and without a model, 2 of them on
{hardware()["cpus"]} cores ({hardware()["cpu"]}); real plan, Ray {versions()["ray"]}, commits and report.

| planned images | shards | images/s listed and planned | images/s handed out and committed | peak memory of the driver, MiB |
| ---: | ---: | ---: | ---: | ---: |
"""  # noqa: E501
    after = """
Once all is done, each a command in a process of its own, with the start of Python:

| planned images | `extract` again, s | its peak, MiB | `status`, s | its peak, MiB |
| ---: | ---: | ---: | ---: | ---: |
"""
    for number in millions:
        count = int(number * 1e6)
        with tempfile.TemporaryDirectory() as name:
            source, output = Path(name, "photos"), Path(name, "out")
            source.mkdir()
            command = [sys.executable, __file__, "--one", str(count), str(source), str(output)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1]) | looked_at(count, source, output)
        text += (
            f"| {row['count']:,} | {row['shards']:,} | {row['listed_per_second']:,.0f} "
            f"| {row['images_per_second']:,.0f} | {row['peak_mib']:.0f} |\n"
        )
        after += (
            f"| {row['count']:,} | {row['resume_seconds']:.1f} | {row['resume_mib']:.0f} "
            f"| {row['status_seconds']:.1f} | {row['status_mib']:.0f} |\n"
        )
    print(text + after)
    (HERE / "SCALE.md").write_text(text + after)


if __name__ == "__main__":
    main()
