"""Everything that is to be known of a machine with one GPU, in about nine minutes.

    python tests/benchmarks/gpu.py [--tiny] [--only SECTION ...]

Prints Markdown: what the machine is, whether the tests for GPUs pass, how fast the model, decoding
and the whole job are, whether all embeddings have the same bits, and what of it is good enough.
Each section is a process of its own with a time limit; if it fails or takes too long, what it had
measured by then is printed, and the next begins. Images are JPEGs of 500 x 375 in memory: crops of
scikit-image's and scikit-learn's photographs, each under many names.

--tiny goes the same ways in about two minutes on a machine without a GPU, with a small network on
the CPU: it shows that this file works, and its figures mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path += [str(HERE), str(ROOT / "tests"), str(ROOT / "pipelines")]

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is measured, and on what. seconds: of one measurement of a rate."""

    folder: Path
    device: str
    models: tuple[str, ...]  # the first is measured in every way
    batches: tuple[int, ...]
    photos: int  # different ones
    names: int  # of each
    shares: tuple[int, ...]  # workers, or processes, to the GPU
    decoders: tuple[int, ...]  # processes, or threads
    seconds: float

    @property
    def photographs(self) -> Path:
        return self.folder / "photographs"

    @property
    def images(self) -> Path:
        return self.folder / "images"


def setting(folder: Path, tiny: bool) -> Setting:
    if tiny:
        return Setting(folder, "cpu", ("cifar_resnet20", "cifar_resnet32"), (4, 2), photos=12,
                       names=4, shares=(1, 2), decoders=(1, 2), seconds=0.2)  # fmt: skip
    return Setting(folder, "cuda", ("resnet50", "resnet18", "resnet152"), (256, 128), photos=1000,
                   names=60, shares=(1, 2, 4, 8), decoders=(1, 2, 4, 8, 16), seconds=1)  # fmt: skip


def images(at: Setting) -> Iterator[Row]:
    """Write the JPEGs."""
    from photos import photographs
    from PIL import Image

    whole = list(photographs().values())

    def write(number: int) -> None:
        chance, photo = random.Random(number), whole[number % len(whole)]
        width = chance.uniform(0.4, 0.9) * min(photo.width, photo.height * 4 / 3)
        left = chance.uniform(0, photo.width - width)
        top = chance.uniform(0, photo.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        scaled = photo.resize((500, 375), Image.Resampling.LANCZOS, box)
        if number % 2:
            scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = at.photographs / f"{number:05d}.jpg"
        scaled.save(path, quality=85)
        for name in range(at.names):
            os.link(path, at.images / f"{name:02d}-{path.name}")

    for folder in (at.photographs, at.images):
        folder.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(at.photos)))
    sizes = [path.stat().st_size for path in at.photographs.iterdir()]
    yield {"different": at.photos, "files": at.photos * at.names,
           "kB each": f"{sum(sizes) / len(sizes) / 1e3:.0f}"}  # fmt: skip


def machine(at: Setting) -> Iterator[Row]:
    """What it is."""
    import torch

    from resfeat.reporting.report import versions
    from resfeat.runtimes.hardware import hardware

    asked = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    for name, command in {
        "GPU": f"nvidia-smi --query-gpu={asked} --format=csv,noheader",
        "CPU": "lscpu | grep -E 'Model name|Thread|Core|Socket|L3' | tr -s ' ' | paste -sd ';'",
        "compiler": "cc --version | head -1",
    }.items():
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        yield {"what": name, "is": done.stdout.strip() or "none"}
    here = hardware()
    yield {"what": "cores, GiB", "is": f"{here['cpus']}, {here['memory_bytes'] / 2**30:.0f}"}
    known = {**versions(), "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    yield {"what": "versions", "is": ", ".join(f"{name} {each}" for name, each in known.items())}
    size = 2**30 if at.device == "cuda" else 2**24
    there = torch.zeros(size, dtype=torch.uint8, device=at.device)
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=at.device == "cuda")
    for name, source, moved in (("in the GPU", there.clone(), 2), ("to the GPU", pinned, 1)):
        passes = rate(at, lambda source=source: there.copy_(source, non_blocking=True))
        yield {"what": f"copy {name}, GB/s", "is": f"{passes * size * moved / 1e9:.0f}"}


def tests(at: Setting) -> Iterator[Row]:
    """`pytest -m gpu`."""
    some = ["-m", "gpu"] if at.device == "cuda" else ["-k", "graph or wherever or halved"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "tests/test_cuda.py", *some]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield {"outcome": line}
    yield {"outcome": lines[-1] if lines else done.stderr[-300:], "passed": done.returncode == 0}


def rate(at: Setting, run: Callable[[], object]) -> float:
    """Runs a second, of what the device does in turn."""
    import torch

    def wait() -> None:
        if at.device == "cuda":
            torch.cuda.synchronize()

    run()
    wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < at.seconds:
        run()
        count += 1
        if count % 5 == 0:  # so that the GPU always has some to do, and not too many
            wait()
    wait()
    return count / (time.perf_counter() - started)


def forward(at: Setting) -> Iterator[Row]:
    """The model alone, on pixels that are on the device already: least cosine to fp32, and whether
    memory full of NaN or another place in the batch changes a bit."""
    import candidates
    import stand_in

    first, *others = at.models

    def all_of(ways: list[str]) -> list[tuple[str, str, int, str]]:
        return [(first, p, b, way) for p in ("bf16", "fp16") for b in at.batches for way in ways]

    todo = all_of(["eager", "graph", "fused"])
    todo += [(name, "bf16", at.batches[0], way) for name in others for way in ("graph", "fused")]
    todo += [(first, "bf16", at.batches[0], "compile")]  # minutes, it may be
    with stand_in.gpu(at.device):
        for model, precision, batch, way in todo:
            row = {"model": model, "precision": precision, "batch": batch, "way": way}
            try:
                candidate = candidates.Candidate(model, precision, way, at.device)
                some = candidates.pixels(at.photographs, model, batch)
                step = candidate.prepare(some)
                row |= {"images/s": rate(at, step) * batch}
                row |= {"cosine": candidate.cosine(some), "NaN": candidate.poisoned(some)}
                row |= {"elsewhere": candidate.elsewhere(some)}
            except Exception as error:  # whatever a candidate may raise
                row |= {"images/s": None, "failed": f"{type(error).__name__}: {error}"[:120]}
            yield row


def processes(at: Setting) -> Iterator[Row]:
    """The model as workers run it, in several processes on the GPU, without decoding."""
    context = multiprocessing.get_context("spawn")
    for count in at.shares:
        together, answers = context.Barrier(count), context.Queue()
        running = [
            context.Process(target=embed, args=(at, count, together, answers)) for _ in range(count)
        ]
        for process in running:
            process.start()
        rates = [answers.get(timeout=60) for _ in running]
        for process in running:
            process.join()
        if failed := [each for each in rates if isinstance(each, str)]:
            yield {"processes": count, "images/s": None, "failed": failed[0]}
        else:
            yield {"processes": count, "images/s": sum(rates)}


def embed(at: Setting, count: int, together: Barrier, answers: Any) -> None:
    """Answer with the images a second of this process, or with what went wrong."""
    try:
        answers.put(embed_rate(at, count, together))
    except Exception as error:  # the others must not wait for this one
        together.abort()
        answers.put(f"{type(error).__name__}: {error}"[:120])


def embed_rate(at: Setting, count: int, together: Barrier) -> float:
    """Embed a batch again and again, in a worker's two threads."""
    import candidates
    import numpy as np
    import stand_in

    from resfeat.runtimes import cuda
    from resfeat.worker.messages import PASSES_ON_GPU

    with stand_in.gpu(at.device):
        weights = candidates.resolved(at.models[0], "bf16")
        runtime = stand_in.runtime(weights, at.device, 1 / count)
        some = candidates.pixels(at.photographs, at.models[0], cuda.GPU_BATCH)

        def run(until: Callable[[], bool]) -> int:
            batch = runtime.empty(some.shape)
            np.copyto(batch, some)
            done = 0
            while not until():
                runtime.embed(batch)
                done += len(batch)
            return done

        with ThreadPoolExecutor(PASSES_ON_GPU) as pool:
            once = [iter([False, True]).__next__ for _ in range(PASSES_ON_GPU)]
            list(pool.map(run, once))  # the captures
            together.wait()
            started = time.perf_counter()

            def over() -> bool:
                return time.perf_counter() - started > at.seconds

            total = sum(pool.map(run, [over] * PASSES_ON_GPU))
            return total / (time.perf_counter() - started)


def decoding(at: Setting) -> Iterator[Row]:
    """Decoding alone, in processes, and in the threads of one."""
    most, context = max(at.decoders), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(most, context, only_decode, (at.seconds,)) as pool:
        list(
            pool.map(decode_rate, [(at, 0.1)] * most * 2)
        )  # until all have imported what they need
        for count in at.decoders:
            rates = pool.map(decode_rate, [(at, at.seconds)] * count)
            yield {"in": "processes", "count": count, "images/s": sum(rates)}
    for count in at.decoders:
        with ThreadPoolExecutor(count) as threads:
            rates = threads.map(decode_rate, [(at, at.seconds)] * count)
            yield {"in": "threads", "count": count, "images/s": sum(rates)}


def only_decode(seconds: float) -> None:
    import bench  # noqa: F401 (it imports all that decoding takes)


def decode_rate(asked: tuple[Setting, float]) -> float:
    import bench

    at, bench.DECODE_SECONDS = asked
    return bench.decode_rate(at.photographs, "turbo", at.models[0])


def job(at: Setting) -> Iterator[Row]:
    """The whole job, and a digest of the embeddings that it made."""
    for workers in (0, *at.shares):
        yield whole(at, workers)


def whole(at: Setting, workers: int) -> Row:
    from resfeat import open_dataset

    output = at.folder / "out"
    command = [sys.executable, "-m", "resfeat", "extract", at.images, "-o", output, "--model",
               at.models[0], "--weights", "random:0", "--precision", "bf16", "--workers",
               workers, "--log-json"]  # fmt: skip
    share = 1 / max(1, workers)
    command += ["--gpus-per-worker", share if at.device == "cuda" else 0]
    command += ["--runtime", "torch"] + ["--cpus-per-worker", 1] * (at.device == "cpu")
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    row: Row = {"workers": workers, "images/s": None}
    if done.returncode:
        return row | {"verdict": (done.stderr.strip().splitlines() or ["?"])[-1]}
    report = json.loads(done.stdout.splitlines()[-1])
    digest = hashlib.sha256()
    for ids, vectors in open_dataset(output).vectors():
        digest.update("\0".join(ids.to_pylist()).encode() + vectors.tobytes())
    shutil.rmtree(output)
    row |= {"images/s": report["images_per_second"], "start, s": report["start_seconds"]}
    each = {f"{stage}, us": round(spent / report["images"] * 1e6)
            for stage, spent in report["stages"].items()}  # fmt: skip
    row |= {"embeddings": digest.hexdigest()[:12], **each}
    return row | {"verdict": report["verdict"]}


# Seconds that each may take: with less than ten minutes in all.
SECTIONS: dict[str, tuple[Callable[[Setting], Iterator[Row]], int]] = {
    "images": (images, 20),
    "machine": (machine, 25),
    "tests": (tests, 80),
    "forward": (forward, 140),
    "processes": (processes, 65),
    "decoding": (decoding, 60),
    "job": (job, 200),
}


@click.command()
@click.option("--tiny", is_flag=True, help="On the CPU, to see that this file works.")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)))
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(tiny: bool, only: tuple[str, ...], folder: Path | None) -> None:
    """Measure a machine with one GPU."""
    if folder:  # a section, in its own process
        for row in SECTIONS[only[0]][0](setting(folder, tiny)):
            print(json.dumps(row), flush=True)
        return
    measured: dict[str, list[Row]] = {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as made:
        for name in ("images", *(each for each in SECTIONS if each != "images")):
            if only and name not in ("images", *only):
                continue
            measured[name] = section(name, Path(made), tiny)
    print("\n".join(["", "## Good enough?", "", *verdict(measured)]))


def section(name: str, folder: Path, tiny: bool) -> list[Row]:
    """Run one, print what it gave, and give that."""
    function, limit = SECTIONS[name]
    command = [sys.executable, __file__, "--only", name, "--folder", folder, *["--tiny"] * tiny]
    # On a CPU that is shared, threads that wait for each other take many times as long.
    threads = {"OMP_NUM_THREADS": "1"} if tiny else {}
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started, rows, trouble = time.perf_counter(), list[Row](), ""
    with (folder / f"{name}.out").open("w+") as out, (folder / f"{name}.err").open("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, start_new_session=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": found, **threads},
        )  # fmt: skip
        try:
            if process.wait(limit):
                err.seek(0)
                trouble = f"failed: {(err.read().strip().splitlines() or ['?'])[-1]}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            trouble = f"not finished within {limit} s"
        out.seek(0)
        rows = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
    spent = time.perf_counter() - started
    print(f"\n## {name}\n\n{' '.join((function.__doc__ or '').split())} {spent:.0f} s. {trouble}\n")
    print("\n".join(table(rows)), flush=True)
    return rows


def table(rows: list[Row]) -> Iterator[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if columns:
        yield f"| {' | '.join(columns)} |"
        yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(shown(row.get(name, '')) for name in columns)} |"


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7f}" if abs(value) <= 1 else f"{value:,.0f}"
    return "-" if value is None else str(value).replace("|", "/")


def verdict(measured: dict[str, list[Row]]) -> Iterator[str]:
    """Of all that was measured, what is as it should be."""

    def best(section: str, **like: Any) -> float:
        rows = [row for row in measured.get(section, ()) if like.items() <= row.items()]
        return max((row.get("images/s") or 0.0 for row in rows), default=0.0)

    passed = any(row.get("passed") for row in measured.get("tests", ()))
    yield line("the tests for GPUs", passed, "")
    jobs = measured.get("job", [])
    digests = {row.get("embeddings") for row in jobs}
    equal = len(jobs) > 1 and len(digests) == 1 and None not in digests
    told = f"{len(digests)} different in {len(jobs)} runs"
    yield line("all embeddings have the same bits", equal, told)
    decoded, computed, whole = best("decoding"), best("processes"), best("job")
    least = min(decoded, computed)
    share = whole / least if least else 0.0
    told = f"{whole:,.0f} of {least:,.0f}, decoding {decoded:,.0f}, the model {computed:,.0f}"
    yield line("the whole job is 0.9 of the slower of decoding and the model", share >= 0.9, told)
    yield line("10,000 images/s", whole >= 10_000, f"{whole:,.0f}")
    for precision in ("bf16", "fp16"):
        plain, *others = (
            best("forward", way=way, precision=precision, model="resnet50", batch=256)
            for way in ("graph", "eager", "fused", "compile")
        )
        for way, other in zip(("eager", "fused", "compile"), others, strict=True):
            if plain and other:
                yield f"- {way} in {precision}: {other / plain:.2f} of a graph"


def line(what: str, holds: bool, told: str) -> str:
    return f"- **{'PASS' if holds else 'FAIL'}** {what}" + (f": {told}" if told else "")


if __name__ == "__main__":
    main()
