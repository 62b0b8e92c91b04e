"""`process_shard`: one shard from plan to commit.

    loader threads: read, decode ─→ batch of fixed shape ─→ forward threads: embed ─→ write, commit

A bounded number of images is under way: memory grows with neither the shard nor the dataset.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from resfeat.dataset import FailedItem, Part, Row, kept_rows
from resfeat.decoding import CarefulDecoder, Decoder, load
from resfeat.errors import Failure, ResfeatError, Stopped, first_line
from resfeat.plan import read_shard
from resfeat.sources import Item, gone
from resfeat.worker.messages import ShardResult, Task
from resfeat.worker.worker import Worker, forward

# Prefetch per shard, beyond the batches that are being embedded, to even out reading and decoding.
IMAGES_AHEAD = 64
BATCHES_AHEAD = 2
CHECK_SECONDS = 1.0

Loading = Future[Row | Failure]


def process_shard(worker: Worker, task: Task) -> ShardResult:
    """Embed one shard and commit it; rows of an earlier commit that `keeps` are not done again.

    Raises Stopped, with nothing committed, soon after the worker is told to stop, DecoderHungError
    where the worker cannot go on, and ResfeatError where the dataset cannot be read or written, or
    the source is gone.
    """
    layout, shard = worker.layout, task.shard
    careful = CarefulDecoder(worker.placement.cpus) if task.careful else nullcontext(worker)
    with _told_of(worker, task):
        items = read_shard(layout.plan, shard)
        committed = kept_rows(layout, shard.number)
        there = ((item, committed.get(item.id)) for item in items)
        kept = {item.id: row for item, row in there if row and keeps(row[0], item)}
        embedded = failed = changed = 0
        unread: list[str] = []
        with Part(layout, shard.number, worker.schema(task.parity)) as part, careful as decoder:
            hand = _Hand(worker, kept, decoder.decode)
            for batch in _embedded_batches(hand, items):
                with hand.stage("write"):
                    part.add(batch.rows, batch.vectors, batch.failures)
                embedded += len(batch.rows)
                failed += len(batch.failures)
                changed += batch.changed
                unread += [each.uri for each in batch.failures if each.failure.stage == "read"]
                worker.progress[shard] = (embedded + failed, failed)
                if worker.stopping.is_set():
                    raise Stopped(f"shard {shard} was left unfinished")
            if unread and (root := gone(worker.job.sources, unread)):
                raise ResfeatError(
                    f"source {root} is gone: mount it, or bring it back, and give the same command "
                    "again, it resumes"
                )
            with hand.stage("write"):
                part.commit(item.id for item in items)
    return ShardResult(
        shard.number, embedded, failed, len(kept), changed, worker.fits, hand.seconds
    )


def keeps(row: Row, item: Item) -> bool:
    """Whether a committed row stays when its shard is done once more: only failures do not."""
    return row.id == item.id


@contextmanager
def _told_of(worker: Worker, task: Task) -> Iterator[None]:
    """Say of what goes wrong with which shard it was, and what can be done about it."""
    where = f"shard {task.shard} of {worker.layout.root}"
    try:
        yield
    except OSError as error:
        next_step = "mend that and give the same command again, it resumes"
        raise ResfeatError(f"{where}: {error}; {next_step}") from error
    except (MemoryError, RuntimeError) as error:  # the latter of torch and OpenVINO
        next_step = "is memory short? give a smaller --batch-size"
        raise ResfeatError(f"{where}: {first_line(error)}; {next_step}") from error
    finally:
        worker.progress.pop(task.shard, None)


@dataclass
class _Hand:
    """A shard in hand. seconds: busy seconds by stage, added up over threads."""

    worker: Worker
    kept: Mapping[str, tuple[Row, NDArray[np.floating]]]  # not to be done again, with their vectors
    decode: Decoder
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: Lock = field(default_factory=Lock)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; no more images are decoded at a time than there are cores."""
        with self.worker.decoding if name == "decode" else nullcontext():
            started = time.perf_counter()
            try:
                yield
            finally:
                spent = time.perf_counter() - started
                with self.lock:
                    self.seconds[name] += spent


@dataclass
class _Batch:
    """A finished batch."""

    rows: list[Row]
    vectors: NDArray[np.floating]  # [len(rows), D], in the type that is stored
    failures: list[FailedItem]
    changed: int  # images that are not what was listed


def _embedded_batches(hand: _Hand, items: Sequence[Item]) -> Iterator[_Batch]:
    """Finished batches in plan order."""
    worker, size = hand.worker, hand.worker.placement.batch_size
    most = worker.forward_threads + max(BATCHES_AHEAD, -(-IMAGES_AHEAD // size))
    under_way: deque[Future[_Batch]] = deque()
    try:
        with worker.feeding:  # the next shard is fed while this one drains, not before
            for start in range(0, len(items), size):
                under_way.append(_start_batch(hand, items[start : start + size]))
                if len(under_way) >= most:
                    yield _await(worker, under_way.popleft())
        while under_way:
            yield _await(worker, under_way.popleft())
    finally:
        for future in under_way:
            future.cancel()


def _await(worker: Worker, batch: Future[_Batch]) -> _Batch:
    while not wait([batch], timeout=CHECK_SECONDS).done:
        if worker.stopping.is_set():
            raise Stopped("left unfinished")
        worker.check_decoders()
    return batch.result()


def _start_batch(hand: _Hand, items: Sequence[Item]) -> Future[_Batch]:
    # Always the full shape, and each image at its own place whatever becomes of the others: the
    # same image gives the same bits in every run.
    worker = hand.worker
    crop = worker.job.identity.preprocessing.crop
    pixels = worker.runtime.empty((worker.placement.batch_size, crop, crop, 3))
    loads = {
        place: worker.loaders.submit(_load, hand, item, pixels[place])
        for place, item in enumerate(items)
        if item.id not in hand.kept
    }
    return worker.forwards.submit(_embed, hand, items, pixels, loads)


def _load(hand: _Hand, item: Item, place: NDArray[np.uint8]) -> Row | Failure:
    """Read and decode one image into its place in the batch."""
    identity = hand.worker.job.identity
    loaded = load(item, identity.preprocessing, identity.decode, hand.decode, hand.stage)
    if isinstance(loaded, Failure):
        return loaded
    picture, size, mtime = loaded
    place[:] = picture.pixels
    return Row(item.id, picture.width, picture.height, size, mtime, item.label, item.carried)


def _embed(
    hand: _Hand, items: Sequence[Item], pixels: NDArray[np.uint8], loads: Mapping[int, Loading]
) -> _Batch:
    with hand.stage("wait"):
        loaded = {place: load.result() for place, load in loads.items()}
    problem = Failure("embed", "non_finite", "the model gave a value that is not finite")
    job = hand.worker.job
    vectors = np.zeros((len(items), sum(job.dims.values())), job.identity.dtype)
    if any(isinstance(outcome, Row) for outcome in loaded.values()):
        with hand.stage("embed"):
            try:
                given = forward(hand.worker, pixels)[: len(items)]
            except torch.OutOfMemoryError as error:
                problem = Failure("embed", "out_of_memory", first_line(error))
                given = np.full(vectors.shape, np.nan, np.float32)
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite: a failure
                vectors = given.astype(job.identity.dtype)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    batch = _Batch([], vectors, [], 0)
    places = []
    for place, item in enumerate(items):
        outcome: Row | Failure
        if item.id in hand.kept:
            outcome, vectors[place] = hand.kept[item.id]
        elif isinstance(outcome := loaded[place], Row):
            batch.changed += (outcome.size, outcome.mtime) != (item.size, item.mtime)
            outcome = outcome if finite[place] else problem
        if isinstance(outcome, Failure):
            batch.failures.append(FailedItem(item.id, item.uri, outcome, item.carried))
        else:
            places.append(place)
            batch.rows.append(outcome)
    batch.vectors = vectors[places]
    return batch
