"""What an index gives, and what making it takes.

    python tests/benchmarks/index.py [--rows 1000000] [--dim 2048] [--kinds ivf,hnsw] [--rounds 5]

The vectors are a mixture, about 50 rows around each of many centres, as embeddings are: in pure
noise all are as far from each other, and no index finds anything. Flat is held against FAISS's own
index in memory, in turns; the other kinds against that exact search, on queries that are no rows.
Each index is made by the command in a process of its own, whose peak of memory is told.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from invented import Vectors, write_dataset

from resfeat.dataset import open_dataset
from resfeat.downstream import Index, open_index
from resfeat.runtimes.hardware import hardware

QUERIES, K, SPREAD = 100, 10, 0.5
NEAR_EACH_CENTRE = 50

COMMAND = """
import sys
from resfeat.cli import main
try:
    main()
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print("\\n" + status["VmHWM"].split()[0])
"""


class Mixture:
    """Rows around centres, made a slice at a time: always the same ones."""

    def __init__(self, rows: int, dim: int) -> None:
        self.rows, self.dim = rows, dim
        count = max(2, rows // NEAR_EACH_CENTRE)
        self.centres = np.random.default_rng(0).standard_normal((count, dim), np.float32)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, some: slice) -> Vectors:
        start, stop, _ = some.indices(self.rows)
        return self.some(stop - start, seed=1 + start)

    def some(self, count: int, seed: int) -> Vectors:
        chance = np.random.default_rng(seed)
        near = self.centres[chance.integers(len(self.centres), size=count)]
        return near + np.float32(SPREAD) * chance.standard_normal(near.shape, np.float32)


def made(output: Path, kind: str) -> dict[str, Any]:
    """What the command says of the index, with the seconds that it took and its peak in MiB."""
    command = [sys.executable, "-c", COMMAND, "index", str(output), "--kind", kind, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    told, peak = done.stdout.split("\n", 1)
    return {**json.loads(told), "wall": seconds, "peak_mib": int(peak) / 1024}


Search = Callable[[Vectors, int], object]


def seconds_of(search: Search, queries: Vectors) -> float:
    started = time.perf_counter()
    search(queries, K)
    return time.perf_counter() - started


def opened(output: Path) -> Index:
    index = open_index(open_dataset(output))
    assert index and not index.stale
    return index


def one_by_one(search: Search, queries: Vectors) -> float:
    """Seconds a query, each asked by itself."""
    return statistics.median(seconds_of(search, queries[n : n + 1]) for n in range(20))


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--dim", default=2048, show_default=True)
@click.option("--kinds", default="ivf,hnsw", show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(rows: int, dim: int, kinds: str, rounds: int) -> None:
    machine = hardware()
    print(f"{machine['cpu']}, {machine['cpus']} cores; faiss {faiss.__version__}")
    print(f"{rows:,} x {dim:,} float32, {rows * dim * 4 / 2**20:,.0f} MiB; a mixture", flush=True)
    mixture = Mixture(rows, dim)
    queries = mixture.some(QUERIES, seed=0)
    units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as name:
        output = Path(name, "out")
        write_dataset(output, mixture, shard_size=4096)
        told(made(output, "flat"))
        ours = opened(output)
        whole = faiss.read_index(str(output / "_resfeat/index/avgpool/index.faiss"))
        alone = faiss.downcast_index(whole.index)  # without numbers of its own
        exact = ours.search(queries, K).ids
        alone.search(units, K)
        pairs = [
            (seconds_of(ours.search, queries), seconds_of(alone.search, units))
            for _ in range(rounds)
        ]
        together = statistics.median(theirs for _, theirs in pairs) / QUERIES
        share = statistics.median(theirs / mine for mine, theirs in pairs)
        apart = one_by_one(alone.search, units)
        print(f"flat: {share:.3f} of FAISS's own rate, {QUERIES} queries at once")
        print(
            f"exact: {together * 1e3:.3g} ms a query of {QUERIES}, {apart * 1e3:.3g} ms alone",
            flush=True,
        )
        del alone, whole, ours
        for kind in kinds.split(","):
            told(made(output, kind))
            index = opened(output)
            found = index.search(queries, K).ids
            recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found, exact, strict=True)])
            times = [seconds_of(index.search, queries) for _ in range(rounds)]
            mine, single = statistics.median(times) / QUERIES, one_by_one(index.search, queries)
            print(
                f"{kind}: recall@{K} {recall:.3f}; {mine * 1e3:.3g} ms a query of {QUERIES}, "
                f"{together / mine:.1f} times the exact rate; {single * 1e3:.3g} ms alone, "
                f"{apart / single:.1f} times",
                flush=True,
            )


def told(made: dict[str, Any]) -> None:
    measured = made["measured"]
    print(
        f"{made['kind']} made in {made['wall']:.1f} s, peak {made['peak_mib']:,.0f} MiB; "
        f"trained on {made['trained_on']:,}, effort {made['effort']}, recall on held-out rows "
        f"{measured['recall_at_10']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
