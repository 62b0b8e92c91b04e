"""Exact search against reading alone: how near a scan of Parquet is to the speed of reading it.

    python tests/benchmarks/search.py [--rows 1000000] [--queries 100] [--folder /dev/shm]

Invented embeddings of 2,048 numbers, in clusters as those of photographs are, are written part by
part as resfeat writes them: 8.2 GB a million. Then each of these is done once a round, in turn, and
the middle of the rounds is printed as Markdown, by the clock and by the processor, which others on
the machine disturb less: the column read by Arrow's own scan and by a
ParquetFile in each of as many threads as there are cores, the column read by resfeat, search by
cosine and by L2, and FAISS's flat index on vectors that it holds in memory, where FAISS is
installed. Search must give what FAISS does.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq

from resfeat import nearest, open_dataset
from resfeat.backbones.weights import resolve
from resfeat.dataset import Dataset, Layout, Part, Record, Row, embeddings_schema
from resfeat.plan import read_shard, write_plan
from resfeat.reporting import versions
from resfeat.runtimes.hardware import hardware
from resfeat.sources import Item, table_of
from resfeat.spec import FeatureSpec, SourceOptions

D, CLUSTERS, K = 2048, 1000, 10
ROUNDS = 5


def invented(count: int, seed: int) -> np.ndarray:
    """Embeddings float32 [count, D] in clusters, none of a number below zero."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, D), np.float32)
    chance = np.random.default_rng(seed)
    made = chance.standard_normal((count, D), np.float32)
    made += centres[chance.integers(CLUSTERS, size=count)]
    return np.maximum(made, 0, out=made)


def write(output: Path, rows: int) -> None:
    """A finished dataset of so many rows."""
    layout = Layout(output)
    for each in layout.folders:
        each.mkdir(parents=True)
    weights = resolve(FeatureSpec(model="resnet50", weights="random:0"))
    items = (
        table_of([Item(f"{n // 1000:05d}/{n:08d}.jpg", f"file:///x/{n}", 1, 0) for n in some])
        for some in (range(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    )
    planned = write_plan(layout.plan, layout.tmp, items, 4096)
    Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=("/x",),
        source_options=SourceOptions(),
        plan=planned,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    ).save(layout)
    schema = embeddings_schema(weights.identity, weights.dims, with_label=False)
    for shard in planned.shards.values():
        listed = read_shard(layout.plan, shard)
        with Part(layout, shard.number, schema) as part:
            images = [Row(item.id, 64, 64, 1, 0) for item in listed]
            part.add(images, invented(len(images), 1 + shard.number))
            part.commit(item.id for item in listed)


def by_arrow(dataset: Dataset) -> None:
    for batch in dataset.embeddings.to_batches(columns=["embedding"]):
        batch["embedding"].flatten().to_numpy()


def in_threads(dataset: Dataset) -> None:
    def read(path: Path) -> None:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(4096, columns=["embedding"], use_threads=False):
                batch["embedding"].flatten().to_numpy()

    with ThreadPoolExecutor(hardware()["cpus"]) as pool:
        list(pool.map(read, sorted(dataset.layout.embeddings.iterdir())))


def by_resfeat(dataset: Dataset) -> None:
    def read(shard: int) -> None:
        for _ in dataset.part(shard, 1024):
            pass

    with ThreadPoolExecutor(hardware()["cpus"]) as pool:
        list(pool.map(read, dataset.layout.committed()))


def flat(dataset: Dataset, queries: np.ndarray) -> Callable[[], np.ndarray] | None:
    """Search by FAISS, of vectors in memory; None without it."""
    with suppress(ImportError):
        import faiss

        index = faiss.IndexFlatIP(D)
        for _, vectors in dataset.vectors():
            index.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        directions = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        return lambda: index.search(directions, K)[1]
    return None


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--queries", "count", default=100, show_default=True)
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--folder", type=click.Path(exists=True), help="Where to write.  [default: temp]")
def main(rows: int, count: int, rounds: int, folder: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        output = Path(name, "out")
        started = time.perf_counter()
        write(output, rows)
        dataset, queries = open_dataset(output), invented(count, 0)
        print(f"{rows:,} rows written in {time.perf_counter() - started:.0f} s", flush=True)
        in_memory = flat(dataset, queries)
        ways: dict[str, Callable[[], object]] = {
            "the column, by Arrow's scan": lambda: by_arrow(dataset),
            "the column, by ParquetFile in threads": lambda: in_threads(dataset),
            "the column, by resfeat": lambda: by_resfeat(dataset),
            f"search, {count} queries": lambda: nearest(dataset, queries, K),
            f"search by L2, {count} queries": lambda: nearest(dataset, queries, K, metric="l2"),
            "search, 1 query": lambda: nearest(dataset, queries[:1], K),
        }
        if in_memory:
            ways["FAISS flat, of vectors in memory"] = in_memory
            expected = in_memory()
            ids = np.array(dataset.ids(), object)
            same = (nearest(dataset, queries, K).ids == ids[expected]).mean()
            print(f"the same neighbours as FAISS: {same:.2%}", flush=True)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, do in ways.items():
                began, busy = time.perf_counter(), time.process_time()
                do()
                took = time.perf_counter() - began, time.process_time() - busy
                seconds[way].append(took)
    about = hardware()
    middle = {
        way: [statistics.median(each) for each in zip(*took, strict=True)]
        for way, took in seconds.items()
    }
    clock, processor = map(min, zip(*list(middle.values())[:2], strict=True))
    print(
        f"\n{rows:,} x {D} float32 ({rows * D * 4 / 1e9:.1f} GB), {about['cpus']} cores "
        f"({about['cpu']}), {rounds} rounds, load {os.getloadavg()[0]:.1f}\n\n"
        "The ratio is to the faster of the first two.\n\n"
        "| | clock, s | ratio | processor, s | ratio |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for way, (wall, busy) in middle.items():
        ratios = wall / clock, busy / processor
        print(f"| {way} | {wall:.2f} | {ratios[0]:.2f} | {busy:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
