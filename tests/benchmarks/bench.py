"""resfeat against the tools that people use for this job: one run, one machine, the same images.

    python tests/benchmarks/bench.py [--count 576] [--large 192] [--model resnet50]
        [--only NAME ...] [--python NAME=PATH ...]

Each contender of `peers.py` is a process of its own, without a GPU, and embeds the same JPEGs with
the same random weights: first `--count` of the usual size and then, some of them, `--large` of 12
megapixels. After each run of resfeat the forward pass of the dataset that it made is measured
alone; at the end, so is decoding. Prints tables and, unless `--only` is given, writes them to
RESULTS.md beside this file.

Two contenders need an environment of their own, which `--python` names:

    --python lightly-train=.lightly/bin/python --python thingsvision=.thingsvision/bin/python
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torchvision.models import get_model

from resfeat import runtimes
from resfeat.backbones.ours import default_pixels
from resfeat.backbones.weights import resolve
from resfeat.dataset import Layout, Record
from resfeat.decoding.decode import decode
from resfeat.fidelity.sample import pictures, sample
from resfeat.reporting.report import versions
from resfeat.runtimes.hardware import hardware
from resfeat.spec import FeatureSpec

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1] / "pipelines")]

from peers import CONTENDERS  # noqa: E402
from photos import write_photos  # noqa: E402

USUAL, LARGE = (500, 375), (4000, 3000)
BASELINE, OURS, RAY = "torchvision + DataLoader", "resfeat --workers 0", "resfeat on Ray"
# These, of which small ratios are told, are run so often in turn, and the middle one is taken.
REPEATED, ROUNDS = (BASELINE, OURS, RAY), 3
# What a photograph of 12 megapixels costs is its decoding; these show it.
ON_LARGE = (BASELINE, OURS, f"{OURS}, bf16", f"{OURS}, int8")
WARM_UP_SECONDS, FORWARD_SECONDS, DECODE_SECONDS = 2, 8, 5
# What a contender leaves behind, as Ray does, has so long to go away.
SETTLE_SECONDS = 3
FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"

Rows = dict[str, dict[str, Any] | None]


@click.command()
@click.option("--count", default=576, show_default=True, help="JPEGs of 500 x 375.")
@click.option("--large", default=192, show_default=True, help="JPEGs of 12 megapixels; 0 for none.")
@click.option("--model", default="resnet50", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)))
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="NAME=PATH",
    help="The interpreter that runs a contender.",
)
def main(
    count: int, large: int, model: str, only: tuple[str, ...], pythons: tuple[str, ...]
) -> None:
    """Run the contenders in turn and print their rates and ratios."""
    interpreters = parse(pythons)
    load = os.getloadavg()[0]
    names = only or tuple(CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        usual, big = Path(folder) / "usual", Path(folder) / "large"
        prepare(usual, count, USUAL, model)
        rows = in_turn(names, lambda name: measure(name, usual, count, model, interpreters))
        prepare(big, large, LARGE, model)
        on_large = [name for name in names if name in ON_LARGE and large]
        large_rows = in_turn(on_large, lambda name: measure(name, big, large, model, interpreters))
        decoded = {} if only else decode_rates((usual, USUAL), (big, LARGE), model=model)
    text = "\n".join(report(rows, large_rows, decoded, model, command(), load))
    print(text)
    if not only:
        (HERE / "RESULTS.md").write_text(text + "\n")


def parse(pythons: tuple[str, ...]) -> dict[str, str]:
    given = dict(each.partition("=")[::2] for each in pythons)
    for name, path in given.items():
        if name not in CONTENDERS or not shutil.which(path):
            raise click.BadParameter(
                f"--python {name}={path}: give NAME=PATH, of a contender and an interpreter"
            )
    return given


def command() -> str:
    """What was typed, without the paths of this machine."""
    words = [word.rpartition("=")[0] if os.sep in word else word for word in sys.argv[1:]]
    return " ".join(["python tests/benchmarks/bench.py", *words])


def prepare(folder: Path, count: int, size: tuple[int, int], model: str) -> None:
    """JPEGs of this size, and a checkpoint for everybody."""
    (folder / "in").mkdir(parents=True)
    for number, path in enumerate(write_photos(folder / "photos", count)):
        with Image.open(path) as photo:
            scaled = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        scaled.save(folder / "in" / f"{number:05d}.jpg", quality=85)
    torch.manual_seed(0)
    torch.save(get_model(model).state_dict(), folder / "weights.pth")


def in_turn(names: Sequence[str], run: Callable[[str], dict[str, Any] | None]) -> Rows:
    """What each gave; of those that are run several times, the one with the median rate."""
    every: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names:
            if number == 0 or name in REPEATED:
                row = run(name)
                every[name] += [row] if row else []
    return {
        name: sorted(rows, key=rate_of)[len(rows) // 2] if rows else None
        for name, rows in every.items()
    }


def measure(
    name: str, folder: Path, count: int, model: str, interpreters: dict[str, str]
) -> dict[str, Any] | None:
    """Images, seconds, versions and those of the whole process; None where it is not installed."""
    print(f"{name}, {count} images ...", file=sys.stderr, flush=True)
    python = interpreters.get(name, sys.executable)
    module = CONTENDERS[name].package.replace("-", "_")
    if subprocess.run([python, "-c", FIND, module]).returncode:
        return None
    shutil.rmtree(folder / name, ignore_errors=True)
    time.sleep(SETTLE_SECONDS)
    started = time.perf_counter()
    done = subprocess.run(
        [python, str(HERE / "peers.py"), name, str(folder), model],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    whole = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(f"{name} failed:\n{done.stderr[-3000:]}")
    row = {**json.loads(done.stdout.splitlines()[-1]), "whole": whole}
    if row["images"] != count:
        raise click.ClickException(f"{name} embedded {row['images']} of {count} images")
    if "start_seconds" in row:
        row["forward"] = alone(forward, folder / name, folder / "weights.pth")
    return row


def alone(function: Callable[..., float], *arguments: Any) -> float:
    """The function's result, from a process that does nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def forward(output: Path, checkpoint: Path) -> float:
    """Images/s of the forward pass alone: the dataset's network, on the runtime, the cores and in
    the batches that it was made with, on pictures of its own."""
    layout = Layout(output)
    record = Record.load(layout)
    assert record is not None
    identity = record.identity
    engine = json.loads(next(layout.runs.glob("*.json")).read_text())["engine"]
    threads, batch_size = engine["cpus"], engine["batch_size"]
    tensors = resolve(FeatureSpec.of(identity, str(checkpoint))).tensors
    network = runtimes.prepare(engine["runtime"], identity, tensors, layout.quantised)
    runtime = runtimes.start(network, device="cpu", threads=threads, batch_size=batch_size)
    items = sample(layout, record.plan, batch_size)
    chosen = pictures(items, identity.preprocessing, identity.decode, batch_size)
    pixels = np.stack(list(itertools.islice(itertools.cycle(chosen), batch_size)))

    def rate(seconds: float) -> float:
        started, batches = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            runtime.embed(pixels)
            batches += 1
        return batches * batch_size / (time.perf_counter() - started)

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(rate, [WARM_UP_SECONDS] * threads))
        return sum(pool.map(rate, [FORWARD_SECONDS] * threads))


def decode_rates(
    *sets: tuple[Path, tuple[int, int]], model: str
) -> dict[tuple[int, int], list[float]]:
    """By size, images/s on one core with libjpeg-turbo and with Pillow."""
    print("decoding ...", file=sys.stderr, flush=True)
    return {
        size: [alone(decode_rate, folder / "in", way, model) for way in ("turbo", "pillow")]
        for folder, size in sets
        if any((folder / "in").iterdir())
    }


def decode_rate(photos: Path, way: str, model: str) -> float:
    torch.set_num_threads(1)
    pixels = default_pixels(model)
    contents = [path.read_bytes() for path in sorted(photos.iterdir())]
    decode(contents[0], pixels, way)
    started = time.perf_counter()
    for done, data in enumerate(itertools.cycle(contents)):
        if done and time.perf_counter() - started > DECODE_SECONDS:
            break
        decode(data, pixels, way)
    return done / (time.perf_counter() - started)


def report(
    rows: Rows,
    large_rows: Rows,
    decoded: dict[tuple[int, int], list[float]],
    model: str,
    typed: str,
    load: float,
) -> Iterator[str]:
    """RESULTS.md, line by line."""
    yield "# Measured"
    yield ""
    yield f"`{typed}`, {date.today()}: {model}, fp32 where nothing else is said, random weights."
    yield from machine({**rows, **large_rows}, load)
    yield ""
    yield "Rates are from the first batch's request to the last row on disk. Start-up is the rest"
    yield "of the whole process: imports, loading the model and, in resfeat, calibrating int8."
    yield "On Ray the comparison with fp32 on torch is part of it. In int8 it runs beside the"
    yield "calibration; else, with --workers 0, beside the first images, and counts in their rate:"
    yield "the fewer they are, the lower it is. What each contender does: [peers.py](peers.py)."
    yield f"{', '.join(REPEATED)}: the middle one of {ROUNDS} runs, in turn."
    yield from contenders(rows, USUAL)
    yield from shares(rows)
    if large_rows:
        yield from contenders(large_rows, LARGE)
    if decoded:
        yield from decoding(decoded)


def machine(rows: Rows, load: float) -> Iterator[str]:
    here = hardware()
    yield f"{here['cpus']} cores ({here['cpu']}), {here['memory_bytes'] / 2**30:.0f} GiB, no GPU;"
    yield f"load before the start {load:.1f}."
    known = versions()
    for row in rows.values():
        for name, number in row["versions"].items() if row else ():
            known.setdefault(name, number)
    yield ", ".join(f"{name} {number}" for name, number in known.items()) + "."


def contenders(rows: Rows, size: tuple[int, int]) -> Iterator[str]:
    images = next((row["images"] for row in rows.values() if row), 0)
    yield from ("", f"## {images} JPEGs of {size[0]} x {size[1]}", "")
    yield "| | images/s | ratio to DataLoader | start-up, s | whole process, s |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    baseline = rows.get(BASELINE)
    for name, row in rows.items():
        if row is None:
            yield f"| {name} | not installed here | | | |"
            continue
        ratio = f"{rate_of(row) / rate_of(baseline):.2f}" if baseline else "-"
        other = row["versions"]["torch"] != versions()["torch"]
        label = f"{name} (torch {row['versions']['torch']})" if other else name
        start_up = row["whole"] - row["seconds"]
        yield f"| {label} | {rate_of(row):.1f} | {ratio} | {start_up:.1f} | {row['whole']:.1f} |"


def shares(rows: Rows) -> Iterator[str]:
    ours = {name: row for name, row in rows.items() if row and "forward" in row}
    if not ours:
        return
    yield from ("", "## The whole job as a share of its forward pass alone", "")
    yield "Forward alone: the same network and runtime, a batch to each core, nothing else running."
    yield "To first worker: the `start_seconds` of resfeat's own report, without imports."
    yield ""
    yield "| | whole job, images/s | forward alone, images/s | share | to first worker, s |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, row in ours.items():
        yield (
            f"| {name} | {rate_of(row):.1f} | {row['forward']:.1f} "
            f"| {rate_of(row) / row['forward']:.0%} | {row['start_seconds']:.1f} |"
        )


def decoding(rates: dict[tuple[int, int], list[float]]) -> Iterator[str]:
    yield from ("", "## Decoding alone, on one core", "")
    yield "| JPEGs of | --decode turbo, images/s | --decode pillow, images/s | ratio |"
    yield "| --- | ---: | ---: | ---: |"
    for (width, height), (turbo, pillow) in rates.items():
        yield f"| {width} x {height} | {turbo:.1f} | {pillow:.1f} | {turbo / pillow:.2f} |"


def rate_of(row: dict[str, Any]) -> float:
    return row["images"] / row["seconds"]


if __name__ == "__main__":
    main()
