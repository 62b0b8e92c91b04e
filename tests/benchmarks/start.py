"""Start-up: seconds from the command to its first worker, which is when images are handed out.

    python tests/benchmarks/start.py [--count 2000] [--rounds 5]

ResNet-50 in fp32 from a checkpoint; on a Ray of the command's own, and with --workers 0, in turns.
Prints the middle of the rounds, and all of them.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "pipelines")]

from bench import OURS, RAY, SETTLE_SECONDS, USUAL, prepare

from resfeat.runtimes.hardware import hardware

WAYS = {RAY: (), OURS: ("--workers", "0")}


def seconds_to_a_worker(folder: Path, output: Path, options: tuple[str, ...]) -> float:
    """Of a run that is then ended."""
    command = [sys.executable, "-m", "resfeat", "extract", str(folder / "in"), "-o", str(output),
               "--weights", str(folder / "weights.pth"), "--log-json", *options]  # fmt: skip
    told = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    ) as run:
        for line in run.stdout:
            told.append(line)
            if line.startswith("{") and json.loads(line).get("workers"):
                spent = time.perf_counter() - started
                break
        else:
            raise click.ClickException("".join(["no worker was ready:\n", *told]))
        run.send_signal(signal.SIGINT)
        next(run.stdout, None)  # it says that it heard; once more ends it at once
        run.send_signal(signal.SIGINT)
    return spent


@click.command()
@click.option("--count", default=2000, show_default=True, help="JPEGs of 500 x 375.")
@click.option("--rounds", default=5, show_default=True)
def main(count: int, rounds: int) -> None:
    """Start runs in turns, and tell how long each took until it had a worker."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, count, USUAL, "resnet50")
        for number in range(rounds):
            for way, options in WAYS.items():
                time.sleep(SETTLE_SECONDS)  # what the one before left on Ray goes away
                output = folder / f"{number}{'-'.join(options)}"
                seconds[way].append(seconds_to_a_worker(folder, output, options))
    print(f"{hardware()['cpu']}, {hardware()['cpus']} cores; {count} JPEGs, to the first worker:")
    for way, every in seconds.items():
        all_of_them = ", ".join(f"{each:.1f}" for each in sorted(every))
        print(f"  {way}: {statistics.median(every):.1f} s ({all_of_them})")


if __name__ == "__main__":
    main()
