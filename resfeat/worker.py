"""A worker: one model on one device, and `process_shard`, which takes a shard from plan to commit.

    loader threads: read, decode ─→ batch of fixed shape ─→ forward threads: embed ─→ write, commit

Both pools live as long as the worker and are shared by the shards in hand; a bounded number of
images of each shard is under way, so memory grows with neither the shard nor the dataset. This
module knows nothing of Ray.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import BoundedSemaphore, Event, Lock, get_ident

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from resfeat import plan, runtimes
from resfeat.careful import CarefulDecoder
from resfeat.clock import StageClock
from resfeat.dataset import Record
from resfeat.decode import Picture, decode
from resfeat.errors import DecoderHungError, Failure, ResfeatError, Stopped
from resfeat.job import Job, Placement, ShardResult
from resfeat.layout import Layout
from resfeat.runtimes import Network
from resfeat.sink import FailedItem, Part, Row, embeddings_schema, kept_rows
from resfeat.sources import folder_of, gone, read
from resfeat.sources.item import Item
from resfeat.spec import Decode, Preprocessing
from resfeat.store import StoreError

# Of a shard, beyond the batches that are being embedded: at least this many images, in batches of
# which there are at least two, are under way. Enough for the unevenness of reading and decoding.
IMAGES_AHEAD = 64
BATCHES_AHEAD = 2
# Forward passes at a time on a GPU: the copies of one run while the other is computed.
PASSES_ON_GPU = 2
# An image that has been decoded for so long hangs; the slowest that is allowed takes a few seconds.
HUNG_SECONDS = 60.0
CHECK_SECONDS = 1.0

Decoder = Callable[..., Picture | Failure]
Kept = Mapping[str, tuple[Row, NDArray[np.floating]]]


class Worker:
    """The model and the thread pools that the shards of one worker share.

    Forward passes run one batch to a thread, each on a single core: with more threads inside a
    forward pass the last bits of an embedding depend on how many there are.

    progress: images done and failed so far, by shard in hand. fits: images that the device's memory
    is thought to hold at once. stopping: set it to have shards in hand raise Stopped soon.
    decoding_since: when each thread that is decoding an image began with it.
    """

    def __init__(self, job: Job, placement: Placement, network: Network) -> None:
        self.job = job
        self.placement = placement
        self.layout = Layout(job.output)
        self.forward_threads = PASSES_ON_GPU if placement.device == "cuda" else placement.cpus
        self.runtime = runtimes.start(
            placement.runtime,
            job.identity,
            network,
            device=placement.device,
            threads=self.forward_threads,
            batch_size=placement.batch_size,
        )
        self.fits = placement.batch_size
        self.progress: dict[int, tuple[int, int]] = {}
        self.stopping = Event()
        self.decoding_since: dict[int, float] = {}
        self.loaders = _threads("load", placement.cpus + job.reads_ahead)
        self.forwards = _threads("forward", self.forward_threads)
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
            quantised=record.quantised,
        )

    def embed(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embeddings [N, D] of pictures uint8 [H, W, 3], in batches and threads as in a run.

        Raises ResfeatError where the device's memory does not hold a single one.
        """
        size = self.placement.batch_size
        batches = []
        for start in range(0, len(pictures), size):
            some = pictures[start : start + size]
            batch = self.runtime.empty((size, *some[0].shape))
            batch[: len(some)] = some
            batches.append(self.forwards.submit(forward, self, batch))
        try:
            return np.concatenate([batch.result() for batch in batches])[: len(pictures)]
        except torch.OutOfMemoryError as error:
            raise ResfeatError(
                "the device's memory does not hold the network and one image: see what else is on "
                f"it, or give a smaller --model ({str(error).splitlines()[0]})"
            ) from error

    def decode(self, data: bytes, preprocessing: Preprocessing, way: Decode) -> Picture | Failure:
        """As `decode.decode`, in this thread, and under the eyes of `check_decoders`."""
        self.decoding_since[get_ident()] = time.monotonic()
        try:
            return decode(data, preprocessing, way)
        finally:
            del self.decoding_since[get_ident()]

    def check_decoders(self) -> None:
        """Raise DecoderHungError where an image has been decoded for too long."""
        now = time.monotonic()
        if any(now - since > HUNG_SECONDS for since in list(self.decoding_since.values())):
            raise DecoderHungError

    def close(self) -> None:
        """Let the threads go; whatever has not begun is dropped."""
        self.forwards.shutdown(wait=False, cancel_futures=True)
        self.loaders.shutdown(wait=False, cancel_futures=True)


def _threads(name: str, count: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each: there are enough of them."""
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


def process_shard(worker: Worker, shard: int, *, careful: bool = False) -> ShardResult:
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
        items = plan.read_shard(worker.layout, shard)
        kept = kept_rows(worker.layout, shard)
        with (
            Part(worker.layout, shard, worker.schema) as part,
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
        shard, embedded, failed, len(kept), changed, worker.fits, dict(clock.seconds)
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
    label = folder_of(item.uri) if worker.job.with_label else None
    return Row(item.id, picture.width, picture.height, size, mtime, label)


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


def forward(worker: Worker, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embeddings of a batch, in halves from the first time on that the device's memory does not
    hold it. Raises torch.OutOfMemoryError where it does not hold a single image."""
    while True:
        fits = worker.fits
        try:
            starts = range(0, len(pixels), fits)
            return np.concatenate([worker.runtime.embed(pixels[i : i + fits]) for i in starts])
        except torch.OutOfMemoryError:
            if fits == 1:
                raise
        # Another thread may have halved it meanwhile.
        worker.fits = min(worker.fits, fits // 2)
        torch.cuda.empty_cache()
