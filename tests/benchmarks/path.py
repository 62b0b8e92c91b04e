"""The data path by itself: a model that costs nothing, against decoding alone on the same threads.

    python tests/benchmarks/path.py [--count 2000] [--rounds 5]

First a job of four shards, from the plan to the commits, with a network that gives zeros, in turns
with decoding the same JPEGs of 500 x 375 from memory. As in a run two shards are in hand, so that
one is decoded while the other drains and commits. Each shard lists all JPEGs, by links, so that it
is of about half the usual 4,096 images; a job of one such shard shows what its ends cost, while
decoders have nothing or not all to do. Each job is held against decoding right before and after it,
since a machine that others use changes from minute to minute.
Then the job with decoders and a resize that return at once: the processor time of what is left is
what Python costs for an image, and more than it holds the interpreter's lock. On a machine that
others use the ratio of processor times is the steadier one: it is what is left of the cores for
decoding. From this follows what one process can reach on many cores, by
the asymptotic bounds of operational analysis (Denning and Buzen, "The Operational Analysis of
Queueing Network Models", 1978): N threads that hold one lock for D and do without it for Z make
between N / (Z + N D) and min(N / (Z + D), 1 / D). Prints the middle of the rounds.
"""

from __future__ import annotations

import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch

from resfeat import RuntimeOptions, runtimes
from resfeat.backbones.weights import resolve
from resfeat.plan import Shard
from resfeat.reporting import bench as reporting
from resfeat.runtimes.hardware import cpu_count, hardware
from resfeat.runtimes.torch import use_one_core
from resfeat.sources import listing
from resfeat.spec import FeatureSpec, SourceOptions
from resfeat.worker import SHARDS_IN_HAND, Job, Task
from resfeat.worker.shard import process_shard
from resfeat.worker.worker import Worker, network_for, place_here

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "pipelines")]

from bench import USUAL, prepare

decoding = importlib.import_module("resfeat.decoding.decode")  # its function has the same name
CORES = (2, 4, 8, 16)
SHARDS = 4


class Nothing:
    """A runtime that gives zeros [N, 512]."""

    steady = True

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, np.uint8)

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        return np.zeros((len(pixels), 512), np.float32)


@contextmanager
def started(
    folders: Sequence[Path], threads: int, batch: int
) -> Iterator[tuple[Worker, Sequence[Shard]]]:
    """A worker without a model, and the images of these folders, alike many, as a shard each."""
    weights = resolve(FeatureSpec(model="resnet18", weights="random:0"))
    there = listing([str(folder) for folder in folders])
    items = list(there)
    options = RuntimeOptions(
        workers=0, runtime="torch", cpus_per_worker=threads, batch_size=batch, gpus_per_worker=0
    )
    nothing = mock.patch.object(runtimes, "start", lambda *_, **__: Nothing())
    with (
        mock.patch.object(reporting, "SHARD", len(items) // len(folders)),
        reporting._dataset(there, items, SourceOptions(), weights, print) as (layout, record),
    ):
        job = Job.of(layout, record, weights.dims)
        placement = place_here(options, job.identity)
        network = network_for(job, placement, weights.tensors)
        with nothing, closing(Worker(job, placement, network)) as worker:
            yield worker, list(record.plan.shards.values())


def whole(worker: Worker, shards: Sequence[Shard]) -> tuple[float, float]:
    """Seconds of the clock, and of all processors, for an image of these shards."""
    for part in worker.layout.embeddings.iterdir():
        part.unlink()  # all of it, every time
    clock, spent = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(SHARDS_IN_HAND) as pool:  # as the engines do
        results = list(pool.map(partial(process_shard, worker), map(Task, shards)))
    clock, spent = time.perf_counter() - clock, time.process_time() - spent
    assert not any(result.failed for result in results)
    images = sum(result.embedded for result in results)
    return clock / images, spent / images


def alone(worker: Worker, contents: list[bytes], threads: int) -> tuple[float, float]:
    """The same for an image that is decoded from memory, and nothing else."""
    identity = worker.job.identity

    def some(part: list[bytes]) -> None:
        for data in part:
            decoding.decode(data, identity.preprocessing, identity.decode)

    with ThreadPoolExecutor(threads, initializer=use_one_core) as pool:
        clock, spent = time.perf_counter(), time.process_time()
        list(pool.map(some, [contents[i::threads] for i in range(threads)]))
        clock, spent = time.perf_counter() - clock, time.process_time() - spent
        return clock / len(contents), spent / len(contents)


@contextmanager
def at_once(data: bytes) -> Iterator[None]:
    """Decoding and the resize's kernel give what they were asked before."""
    stored = decoding.simplejpeg.decode_jpeg(data, "RGB")
    shown = torch.zeros(1, 400, 400, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    with (
        mock.patch.object(decoding.simplejpeg, "decode_jpeg", lambda *_, **__: stored),
        mock.patch.object(torch._C._nn, "_upsample_bilinear2d_aa", lambda *_, **__: shown),
    ):
        yield


def middle(rounds: Sequence[Sequence[float]], place: int = 0) -> float:
    """The median of what each round has at this place."""
    return statistics.median(each[place] for each in rounds)


@click.command()
@click.option("--count", default=2000, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch", default=16, show_default=True)
def main(count: int, rounds: int, batch: int) -> None:
    cores, machine = cpu_count(), hardware()
    print(f"{machine['cpu']}, {cores} cores; {count} JPEGs of {USUAL[0]} x {USUAL[1]}")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), count, USUAL, "resnet18")
        folder = Path(name, "in")
        contents = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
        folders = [Path(name, "listed", str(n)) for n in range(SHARDS)]
        for each in folders:
            shutil.copytree(folder, each, copy_function=os.link)
        with (
            started(folders[:1], cores, batch) as single,
            started(folders, cores, batch) as several,
        ):
            jobs = {"a shard": single, f"{SHARDS} such shards": several}
            for job in jobs.values():
                whole(*job)  # the first time is another
            bare = [alone(several[0], contents, cores)]
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
            shares: dict[str, list[list[float]]] = {name: [] for name in jobs}
            for _ in range(rounds):
                for name, job in jobs.items():
                    runs[name].append(whole(*job))
                    bare.append(alone(several[0], contents, cores))
                    around = map(statistics.mean, zip(*bare[-2:], strict=True))
                    pairs = zip(around, runs[name][-1], strict=True)
                    shares[name].append([decoding_s / job_s for decoding_s, job_s in pairs])
            with at_once(contents[0]):
                held = statistics.median(whole(*several)[1] for _ in range(rounds))
    print(f"decoding alone {1 / middle(bare):,.0f} images/s; with a model that costs nothing:")
    for name in jobs:
        ours, clock, spent = middle(runs[name]), middle(shares[name]), middle(shares[name], 1)
        print(f"  {name}: {1 / ours:,.0f}, {clock:.2f}; by processor time {spent:.2f}")
    free = max(ours * cores - held, 0.0)
    print(
        f"of an image's {ours * cores * 1e6:,.0f} us on a core, at most {held * 1e6:.0f} Python's"
    )
    for n in CORES:
        least, most = n / (free + n * held), min(n / (free + held), 1 / held)
        print(f"  one process on {n} such cores: {least:,.0f} to {most:,.0f} images/s")


if __name__ == "__main__":
    main()
