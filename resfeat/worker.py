"""A worker: one model on one device, and `process_shard`, which takes a shard from plan to commit.

    loader threads: read, decode ─→ batch of fixed shape ─→ forward threads: embed ─→ write, commit

Both pools live as long as the worker and are shared by the shards in hand; at most a few batches of
each shard are under way, so memory grows with neither the shard nor the dataset. This module knows
nothing of Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import BoundedSemaphore, Event, Lock

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat import plan
from resfeat.clock import StageClock
from resfeat.dataset import Record
from resfeat.decode import Picture, decode
from resfeat.errors import Failure, ResfeatError, Stopped
from resfeat.layout import Layout
from resfeat.runtimes.torch import TorchRuntime
from resfeat.sink import FailedItem, Part, Row, embeddings_schema
from resfeat.sources.directory import path_of, printable, read
from resfeat.sources.item import Item
from resfeat.spec import Identity

# Files that are read while all decoders are busy: enough to hide the latency of a disk.
READ_AHEAD = 4
# Batches of a shard under way beyond those that are being embedded.
BATCHES_AHEAD = 2
# A worker has two shards in hand: one is decoded and embedded while the other drains and commits.
SHARDS_IN_HAND = 2

BATCH_SIZE = {"cpu": 16, "cuda": 256}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, the same for every worker of a run. Small: the weights travel apart.

    dims: length of each layer's embedding.
    """

    output: str
    identity: Identity
    dims: Mapping[str, int]
    with_label: bool


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a worker runs and what it may use: "cpu" or "cuda", CPU cores, images in a batch."""

    device: str
    cpus: int
    batch_size: int


@dataclass(frozen=True)
class ShardResult:
    """What a committed shard gave. `seconds` are busy seconds by stage, added up over threads."""

    shard: int
    embedded: int
    failed: int
    changed: int
    seconds: Mapping[str, float]


class Worker:
    """The model and the thread pools that the shards of one worker share.

    Forward passes run one batch to a thread, each on a single core: with more threads inside a
    forward pass the last bits of an embedding depend on how many there are.

    progress: images done and failed so far, by shard in hand. stopping: set it to have shards in
    hand raise Stopped soon.
    """

    def __init__(self, job: Job, placement: Placement, tensors: dict[str, Tensor]) -> None:
        self.job = job
        self.placement = placement
        self.layout = Layout(job.output)
        self.runtime = TorchRuntime(job.identity, tensors, placement.device)
        self.progress: dict[int, tuple[int, int]] = {}
        self.stopping = Event()
        self.forward_threads = 1 if placement.device == "cuda" else placement.cpus
        self.loaders = ThreadPoolExecutor(placement.cpus + READ_AHEAD, "load")
        self.forwards = ThreadPoolExecutor(
            self.forward_threads, "forward", initializer=torch.set_num_threads, initargs=(1,)
        )
        self.decoding = BoundedSemaphore(placement.cpus)
        self.feeding = Lock()

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the rows. Read from the record late: by then it holds what was measured."""
        record = Record.load(self.layout)
        if record is None:
            raise ResfeatError(f"{self.layout.spec} is gone: was the output removed?")
        return embeddings_schema(
            self.job.identity,
            self.job.dims,
            with_label=self.job.with_label,
            parity=record.parity,
        )

    def close(self) -> None:
        """Let the threads go; whatever has not begun is dropped."""
        self.forwards.shutdown(wait=False, cancel_futures=True)
        self.loaders.shutdown(wait=False, cancel_futures=True)


def process_shard(worker: Worker, shard: int) -> ShardResult:
    """Embed one shard and commit it.

    Raises Stopped, with nothing committed, soon after the worker is told to stop, and ResfeatError
    where the dataset's own files cannot be read or written.
    """
    clock = StageClock()
    embedded = failed = changed = 0
    try:
        items = plan.read_shard(worker.layout, shard)
        with Part(worker.layout, shard, worker.schema) as part:
            for batch in _embedded_batches(worker, items, clock):
                with clock("write"):
                    part.add(batch.rows, batch.vectors, batch.failures)
                embedded += len(batch.rows)
                failed += len(batch.failures)
                changed += batch.changed
                worker.progress[shard] = (embedded + failed, failed)
                if worker.stopping.is_set():
                    raise Stopped(f"shard {shard} was left unfinished")
            with clock("write"):
                part.commit(item.id for item in items)
    except OSError as error:
        raise ResfeatError(
            f"shard {shard} of {worker.layout.root}: {error}; "
            "mend that and give the same command again, it resumes"
        ) from error
    except MemoryError as error:
        raise ResfeatError(
            f"shard {shard} of {worker.layout.root}: {error}; give a smaller --batch-size"
        ) from error
    finally:
        worker.progress.pop(shard, None)
    return ShardResult(shard, embedded, failed, changed, dict(clock.seconds))


@dataclass
class _Batch:
    """A finished batch: rows and their vectors [len(rows), D], in the type that is stored, and what
    failed."""

    rows: list[Row]
    vectors: NDArray[np.floating]
    failures: list[FailedItem]
    changed: int


def _embedded_batches(worker: Worker, items: Sequence[Item], clock: StageClock) -> Iterator[_Batch]:
    """Finished batches in plan order, with a bounded number of others under way."""
    size = worker.placement.batch_size
    under_way: deque[Future[_Batch]] = deque()
    try:
        with worker.feeding:  # the next shard is fed while this one drains, not before
            for start in range(0, len(items), size):
                under_way.append(_start_batch(worker, items[start : start + size], clock))
                if len(under_way) >= worker.forward_threads + BATCHES_AHEAD:
                    yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _start_batch(worker: Worker, items: Sequence[Item], clock: StageClock) -> Future[_Batch]:
    # Always the full shape, and each image at its own place whatever becomes of the others: the
    # same image gives the same bits in every run.
    crop = worker.job.identity.preprocessing.crop
    pixels = np.zeros((worker.placement.batch_size, crop, crop, 3), np.uint8)
    loads = [
        worker.loaders.submit(_load, worker, item, pixels[place], clock)
        for place, item in enumerate(items)
    ]
    return worker.forwards.submit(_embed, worker, items, pixels, loads, clock)


def _load(worker: Worker, item: Item, place: NDArray[np.uint8], clock: StageClock) -> Row | Failure:
    """Read and decode one image into its place in the batch."""
    with clock("read"):
        content = read(item.uri)
    if isinstance(content, Failure):
        return content
    data, size, mtime = content
    with worker.decoding, clock("decode"):
        picture = decode(data, worker.job.identity.preprocessing)
        if not isinstance(picture, Picture):
            return picture
        place[:] = picture.pixels
    label = printable(path_of(item.uri).parent.name) if worker.job.with_label else None
    return Row(item.id, picture.width, picture.height, size, mtime, label)


def _embed(
    worker: Worker,
    items: Sequence[Item],
    pixels: NDArray[np.uint8],
    loads: Sequence[Future[Row | Failure]],
    clock: StageClock,
) -> _Batch:
    with clock("wait"):
        loaded = [load.result() for load in loads]
    with clock("embed"):
        vectors = worker.runtime.embed(pixels)[: len(items)]
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite: a failure
            vectors = vectors.astype(worker.job.identity.dtype, copy=False)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    batch = _Batch([], vectors, [], 0)
    kept = []
    for place, (item, outcome) in enumerate(zip(items, loaded, strict=True)):
        if isinstance(outcome, Row) and not finite[place]:
            outcome = Failure("embed", "non_finite", "the model gave a value that is not finite")
        if isinstance(outcome, Failure):
            batch.failures.append(FailedItem(item.id, item.uri, outcome))
        else:
            kept.append(place)
            batch.rows.append(outcome)
            batch.changed += (outcome.size, outcome.mtime) != (item.size, item.mtime)
    batch.vectors = vectors[kept]
    return batch
