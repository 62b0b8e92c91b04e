"""`process_shard`: one shard from plan to commit.

    loader threads: read, decode ─→ batch of fixed shape ─→ forward threads: embed ─→ write, commit

A bounded number of images of each shard is under way, so memory grows with neither the shard nor
the dataset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from resfeat.dataset import FailedItem, Part, Row, kept_rows
from resfeat.decoding import CarefulDecoder, Picture
from resfeat.errors import Failure, ResfeatError, Stopped, StoreError
from resfeat.plan import Shard, read_shard
from resfeat.sources import Item, gone, read
from resfeat.worker.clock import StageClock
from resfeat.worker.messages import ShardResult
from resfeat.worker.worker import Worker, forward

# Prefetch per shard, beyond the batches being embedded: at least 64 images and 2 batches. Enough
# for the unevenness of reading and decoding.
IMAGES_AHEAD = 64
BATCHES_AHEAD = 2
CHECK_SECONDS = 1.0

Decoder = Callable[..., Picture | Failure]
Kept = Mapping[str, tuple[Row, NDArray[np.floating]]]


def process_shard(worker: Worker, shard: Shard, *, careful: bool = False) -> ShardResult:
    """Embed one shard and commit it. Of one that was done before, only its failures are done again.

    careful: decode in child processes, so that what crashes or hangs a decoder is a failure row.

    Raises Stopped, with nothing committed, soon after the worker is told to stop, DecoderHungError
    where the worker cannot go on, and ResfeatError where the dataset's own files cannot be read or
    written, or the source is gone.
    """
    clock = StageClock()
    embedded = failed = changed = 0
    unread: list[str] = []
    try:
        items = read_shard(worker.layout.plan, shard)
        kept = kept_rows(worker.layout, shard.number)
        with (
            Part(worker.layout, shard.number, worker.schema) as part,
            CarefulDecoder(worker.placement.cpus) if careful else nullcontext() as children,
        ):
            decoder = children.decode if children else worker.decode
            for batch in _embedded_batches(worker, items, kept, decoder, clock):
                with clock("write"):
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
            with clock("write"):
                part.commit(item.id for item in items)
    except StoreError:
        raise
    except OSError as error:
        raise ResfeatError(
            f"shard {shard} of {worker.layout.root}: {error}; "
            "mend that and give the same command again, it resumes"
        ) from error
    except (MemoryError, RuntimeError) as error:  # the latter of torch and OpenVINO
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ResfeatError(
            f"shard {shard} of {worker.layout.root}: {reason}; is memory short? "
            "give a smaller --batch-size"
        ) from error
    finally:
        worker.progress.pop(shard, None)
    return ShardResult(
        shard.number, embedded, failed, len(kept), changed, worker.fits, dict(clock.seconds)
    )


@dataclass
class _Batch:
    """A finished batch: rows and their vectors [len(rows), D], in the type that is stored, and what
    failed."""

    rows: list[Row]
    vectors: NDArray[np.floating]
    failures: list[FailedItem]
    changed: int


def _embedded_batches(
    worker: Worker, items: Sequence[Item], kept: Kept, decoder: Decoder, clock: StageClock
) -> Iterator[_Batch]:
    """Finished batches in plan order, with a bounded number of others under way."""
    size = worker.placement.batch_size
    most = worker.forward_threads + max(BATCHES_AHEAD, -(-IMAGES_AHEAD // size))
    under_way: deque[Future[_Batch]] = deque()
    try:
        with worker.feeding:  # the next shard is fed while this one drains, not before
            for start in range(0, len(items), size):
                some = items[start : start + size]
                under_way.append(_start_batch(worker, some, kept, decoder, clock))
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


def _start_batch(
    worker: Worker, items: Sequence[Item], kept: Kept, decoder: Decoder, clock: StageClock
) -> Future[_Batch]:
    # Always the full shape, and each image at its own place whatever becomes of the others: the
    # same image gives the same bits in every run.
    crop = worker.job.identity.preprocessing.crop
    pixels = worker.runtime.empty((worker.placement.batch_size, crop, crop, 3))
    loads = {
        item: worker.loaders.submit(_load, worker, item, pixels[place], decoder, clock)
        for place, item in enumerate(items)
        if item.id not in kept
    }
    return worker.forwards.submit(_embed, worker, items, pixels, loads, kept, clock)


def _load(
    worker: Worker, item: Item, place: NDArray[np.uint8], decoder: Decoder, clock: StageClock
) -> Row | Failure:
    """Read and decode one image into its place in the batch."""
    with clock("read"):
        content = read(item.uri)
    if isinstance(content, Failure):
        return content
    data, size, mtime = content
    identity = worker.job.identity
    with worker.decoding, clock("decode"):
        picture = decoder(data, identity.preprocessing, identity.decode)
        if not isinstance(picture, Picture):
            return picture
        place[:] = picture.pixels
    return Row(item.id, picture.width, picture.height, size, mtime, item.label)


def _embed(
    worker: Worker,
    items: Sequence[Item],
    pixels: NDArray[np.uint8],
    loads: Mapping[Item, Future[Row | Failure]],
    kept: Kept,
    clock: StageClock,
) -> _Batch:
    with clock("wait"):
        loaded = {item.id: load.result() for item, load in loads.items()}
    problem = Failure("embed", "non_finite", "the model gave a value that is not finite")
    vectors = np.zeros((len(items), sum(worker.job.dims.values())), worker.job.identity.dtype)
    if any(isinstance(outcome, Row) for outcome in loaded.values()):
        with clock("embed"):
            try:
                given = forward(worker, pixels)[: len(items)]
            except torch.OutOfMemoryError as error:
                problem = Failure("embed", "out_of_memory", str(error).partition("\n")[0][:300])
                given = np.full(vectors.shape, np.nan, np.float32)
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite: a failure
                vectors = given.astype(worker.job.identity.dtype)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    batch = _Batch([], vectors, [], 0)
    places = []
    for place, item in enumerate(items):
        outcome: Row | Failure
        if item.id in kept:
            outcome, vectors[place] = kept[item.id]
        else:
            outcome = loaded[item.id]
            if isinstance(outcome, Row):
                batch.changed += (outcome.size, outcome.mtime) != (item.size, item.mtime)
                outcome = outcome if finite[place] else problem
        if isinstance(outcome, Failure):
            batch.failures.append(FailedItem(item.id, item.uri, outcome))
        else:
            places.append(place)
            batch.rows.append(outcome)
    batch.vectors = vectors[places]
    return batch
