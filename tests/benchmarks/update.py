"""What an update costs: of a collection of which little changed, and of one that did not change.

    python tests/benchmarks/update.py [few|none]... [--scale 1.0] [--model cifar_resnet20]

few: 100,000 small JPEGs, of which 1 % change, 0.5 % go and 0.5 % are new, at random places. A fresh
extraction before the changes and one after them, with the update between them; the rows of the last
two must be the same, bit for bit. The listing alone, and an update that finds nothing, come last.
none: a million empty files as source, in a dataset whose embeddings are zeros, and an update that
finds nothing. Both by default. Every run is the command in a process of its own, without Ray.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from resfeat import open_dataset
from resfeat.backbones.weights import resolve
from resfeat.dataset import Layout, Part, Record, Row, embeddings_schema
from resfeat.plan import read_shard, write_plan
from resfeat.reporting import versions
from resfeat.runtimes.hardware import hardware
from resfeat.sources import listing
from resfeat.spec import FeatureSpec, SourceOptions

IN_A_FOLDER = 1000
FEATURES = {"model": "cifar_resnet20", "weights": "random:1"}

# Runs a command, and counts how often an image is opened meanwhile. Its peak is not that of
# getrusage, which begins with that of whoever started it.
COUNTED = """
import json, sys, time

opened = 0

def hook(event, args):
    global opened
    opened += event == "open" and str(args[0]).endswith(".jpg")

sys.addaudithook(hook)
try:
    {call}
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({{"opened": opened, "peak_mib": peak, "cpu": time.process_time()}}))
"""
COMMAND = COUNTED.format(call="from resfeat.cli import main; main()")
LISTING = COUNTED.format(
    call="from resfeat.sources import listing; any(t is None for t in listing(sys.argv[1:])"
    ".tables())"
)


def counted(code: str, *arguments: object) -> dict[str, Any]:
    """What a process counted, how many seconds it took, and the report that it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    report = json.loads(lines[-1]) if lines else {}
    return {**json.loads(last), "wall": seconds, "report": report}


def extracted(source: Path, output: Path, model: str, *options: str) -> dict[str, Any]:
    features = ["--model", model, "--weights", FEATURES["weights"], "--workers", "0"]
    return counted(COMMAND, "extract", source, "-o", output, *features, "--log-json", *options)


def told(what: str, run: dict[str, Any]) -> None:
    print(
        f"{what}: {run['wall']:.1f} s, processor {run['cpu']:.1f} s, peak {run['peak_mib']:,.0f} "
        f"MiB, {run['opened']:,} images opened",
        flush=True,
    )


def picture(number: int) -> bytes:
    """A JPEG of 64 x 64 pixels, another one for each number."""
    squares = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    pixels = np.ascontiguousarray(squares.repeat(8, 0).repeat(8, 1))
    return bytes(simplejpeg.encode_jpeg(pixels, quality=85))


def path_of(source: Path, number: int) -> Path:
    return source / f"{number // IN_A_FOLDER:05d}" / f"IMG_{number:07d}.jpg"


def write(source: Path, numbers: Iterable[int], seed: int = 0) -> None:
    for number in numbers:
        path = path_of(source, number)
        if number % IN_A_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)  # before any other of its folder
        path.write_bytes(picture(number + seed))


def change(source: Path, count: int) -> tuple[int, int, int]:
    """At random, change 1 % of so many images, remove 0.5 % and add 0.5 %. Gives how many were
    added, changed and removed."""
    some = count // 200
    picked = random.Random(1).sample(range(count), 3 * some)
    write(source, picked[some:], seed=2 * count)
    for number in picked[:some]:
        path_of(source, number).unlink()
    write(source, range(count, count + some))
    return some, 2 * some, some


def rows(output: Path) -> tuple[pa.Table, pa.Array]:
    """All rows by id, with the bits of the embeddings."""
    table = open_dataset(output).embeddings.to_table().sort_by("id")
    bits = pc.list_flatten(table["embedding"]).combine_chunks().view(pa.uint32())
    return table.drop_columns(["embedding"]), bits


def few(count: int, model: str) -> None:
    with folder() as root:
        source, output, again = root / "in", root / "out", root / "again"
        write(source, range(count))
        told("fresh", first := extracted(source, output, model))
        before = state(output / "embeddings")
        added, changed, removed = change(source, count)
        told("update", update := extracted(source, output, model, "--update"))
        parts = differing(before, state(output / "embeddings"))
        told("fresh, of the same", second := extracted(source, again, model))
        told("listing alone", listed := counted(LISTING, source))
        told("update of nothing", nothing := extracted(source, output, model, "--update"))
        found, read = update["report"]["update"], update["report"]["images"]
        assert (found["added"], found["changed"], found["removed"]) == (added, changed, removed)
        assert all(a.equals(b) for a, b in zip(rows(output), rows(again), strict=True))
        assert not open_dataset(output).failures.count_rows()
    print(
        f"{model}, {count:,} images: {read:,} read ({read / count:.2%}), {update['opened']:,} "
        f"opened, {len(parts)} parts replaced or new, of {len(before)}; rows equal"
    )
    for clock in ("wall", "cpu"):
        fresh = (first[clock] + second[clock]) / 2
        more, most = (update[clock] - each[clock] for each in (listed, nothing))
        print(
            f"(update - listing) / fresh by {clock}: {more / fresh:.3f}; without what an update of "
            f"nothing takes: {most / fresh:.3f}"
        )


def none(count: int, model: str) -> None:
    with folder() as root:
        source, output = root / "in", root / "out"
        started = time.perf_counter()
        for number in range(count):
            path = path_of(source, number)
            if number % IN_A_FOLDER == 0:
                path.parent.mkdir(parents=True)
            path.touch()
        print(f"{count:,} empty files made in {time.perf_counter() - started:.0f} s", flush=True)
        invent(source, output, model)
        before = state(output)
        told("listing alone", listed := counted(LISTING, source))
        told("update of nothing", update := extracted(source, output, model, "--update"))
        told("listing alone", again := counted(LISTING, source))
        files = differing(before, state(output))
        assert not any(update["report"]["update"][name] for name in ("added", "changed", "removed"))
    for clock in ("wall", "cpu"):
        alone = (listed[clock] + again[clock]) / 2
        more = update[clock] - alone
        print(f"an update that finds nothing, more than listing, by {clock}: {more:.1f} s")
    print(f"files that it wrote: {', '.join(sorted(files))}")


def invent(source: Path, output: Path, model: str) -> None:
    """A finished dataset of all that the source holds, with zeros for embeddings."""
    layout, roots = Layout(output), [str(source)]
    for each in layout.folders:
        each.mkdir(parents=True)
    weights = resolve(FeatureSpec(model=model, weights=FEATURES["weights"]))
    there = listing(roots)
    planned = write_plan(layout.plan, layout.tmp, there.tables(), None)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    record = Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=tuple(there.roots),
        source_options=SourceOptions(),
        plan=planned,
        created=created,
        versions=versions(),
    )
    record.save(layout)
    schema = embeddings_schema(weights.identity, weights.dims, with_label=False)
    for shard in planned.shards.values():
        items = read_shard(layout.plan, shard)
        with Part(layout, shard.number, schema) as part:
            images = [Row(item.id, 64, 64, item.size or 0, item.mtime) for item in items]
            part.add(images, np.zeros((len(images), sum(weights.dims.values())), np.float32))
            part.commit(item.id for item in items)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Each file by its name, with what a write or a rename would change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in files
    }


def differing(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> set[str]:
    return {name for name, _ in before.items() ^ after.items()}


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(["few", "none"]))
@click.option("--scale", default=1.0, show_default=True, help="Of the numbers above.")
@click.option("--model", default=FEATURES["model"], show_default=True)
def main(parts: tuple[str, ...], scale: float, model: str) -> None:
    print(f"{hardware()['cpus']} cores ({hardware()['cpu']})")
    if not parts or "few" in parts:
        few(int(100_000 * scale), model)
    if not parts or "none" in parts:
        none(int(1_000_000 * scale), model)


if __name__ == "__main__":
    main()
