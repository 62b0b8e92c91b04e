"""The images of a shard as finished batches.

    loader threads: read, decode a run ─→ batches of fixed shape ─→ forward threads: embed

Loaders take runs of images, so that Python has little to do for each. A batch is embedded as soon
as its images are there, whatever those before it do: one that takes seconds to decode holds nobody
up. What is under way is bounded: memory grows with neither the shard nor the dataset.
"""

import queue
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock, get_ident

import numpy as np
import torch
from numpy.typing import NDArray

from resfeat.dataset import FailedItem, Row
from resfeat.decoding import Decoder, loaded
from resfeat.errors import Failure, first_line
from resfeat.plan import Shard
from resfeat.sources import RUN_IMAGES, Content, Item, Run, runs
from resfeat.worker.worker import Worker, forward

# Prefetch per shard, beyond the batches that are being embedded, to even out reading and decoding.
IMAGES_AHEAD = 128
BATCHES_AHEAD = 2
# Embedded images that wait for one before them. They are small, but a shard may be large.
EARLY_IMAGES = 4096
CHECK_SECONDS = 1.0
UNLOADED = Failure("read", "io_error", "it was never read")


@dataclass(frozen=True)
class Batch:
    """A finished batch. first: the place of its first image among all."""

    first: int
    images: list[Row | FailedItem]
    vectors: NDArray[np.floating]  # [len(images), D], in the type that is stored
    changed: int  # images that are not what was listed


@dataclass
class _Group:
    """Images that share a buffer: some runs, and some batches. first: as of a batch."""

    first: int
    items: Sequence[Item]
    outcomes: list[Row | Failure]  # of images that are loaded
    missing: int  # images that are not loaded yet
    left: int  # batches that are not embedded yet
    started: float
    pixels: NDArray[np.uint8] | None = None  # [at least whole batches, crop, crop, 3]


class Batches:
    """What becomes of items of one shard. seconds: busy seconds by stage, added up over threads.
    bytes_read: of images."""

    def __init__(self, worker: Worker, decode: Decoder, shard: Shard) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes_read = 0
        self._worker = worker
        self._decode = decode
        self._shard = shard
        self._size = worker.placement.batch_size
        self._together = -(-RUN_IMAGES // self._size) * self._size  # images in a group
        self._lock = Lock()
        self._done: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        self._under_way = 0
        self._early: dict[int, Batch] = {}  # that wait for those before them
        self._next = 0  # the place of the next image to give
        self._is_dropped = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; no more runs are decoded at a time than there are cores."""
        with self._worker.decoding if name == "decode" else nullcontext():
            started = time.perf_counter()
            try:
                yield
            finally:
                self._add(name, time.perf_counter() - started)

    def _add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] += seconds

    def of(self, items: Sequence[Item]) -> Generator[Batch]:
        """Finished batches in the order of the items. Raises Stopped soon after the shard is not
        wanted, DecoderHungError where it cannot go on, and what loading and embedding raise."""
        worker, size = self._worker, self._size
        most = worker.forward_threads + max(BATCHES_AHEAD, -(-IMAGES_AHEAD // size))
        coming = runs(items, range(len(items)), self._together)
        try:
            with self._turn():  # the next shard is fed while this one drains, not before
                run = self._following(coming)
                for start in range(0, len(items), self._together):
                    end = min(start + self._together, len(items))
                    group = self._begun(start, items[start:end])
                    while run and run.places[0] < end:
                        worker.load(partial(self._load, group, run))
                        run = self._following(coming)
                    yield from self._finished(most)
            yield from self._finished(1)
        finally:
            self._is_dropped = True
            coming.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """To be fed, of which one shard of a worker has it at a time."""
        while not self._worker.feeding.acquire(timeout=CHECK_SECONDS):
            self._worker.check_wanted(self._shard)
        try:
            yield
        finally:
            self._worker.feeding.release()

    def _following(self, coming: Iterator[Run]) -> Run | None:
        """The next run. Where images can only be read one after the other, they are read here."""
        with self.stage("read"):
            return next(coming, None)

    def _finished(self, most: int) -> Iterator[Batch]:
        """Finished batches in their order, until fewer than `most` are under way."""
        while self._under_way >= most or len(self._early) * self._size > EARLY_IMAGES:
            if batch := self._await():
                self._under_way -= 1
                self._early[batch.first] = batch
            while batch := self._early.pop(self._next, None):
                self._next += self._size
                yield batch

    def _await(self) -> Batch | None:
        """Any batch that is finished; None if none was for a while."""
        try:
            batch = self._done.get(timeout=CHECK_SECONDS)
        except queue.Empty:
            self._worker.check_decoders()
            batch = None
        self._worker.check_wanted(self._shard)
        if isinstance(batch, Exception):
            raise batch
        return batch

    def _begun(self, first: int, items: Sequence[Item]) -> _Group:
        """A group of images that are to be loaded, and then embedded."""
        batches = -(-len(items) // self._size)
        outcomes: list[Row | Failure] = [UNLOADED] * len(items)
        self._under_way += batches
        return _Group(first, items, outcomes, len(items), batches, time.perf_counter())

    def _pixels(self, group: _Group) -> NDArray[np.uint8]:
        """Where a group's pixels go."""
        worker = self._worker
        with self._lock:
            if group.pixels is None:
                try:
                    # The one that was used last: the caches hold some of it.
                    group.pixels = worker.buffers.pop()
                except IndexError:
                    # Always the full shape, whatever becomes of the others: the same image gives
                    # the same bits in every run.
                    crop = worker.job.identity.preprocessing.crop
                    group.pixels = worker.runtime.empty((self._together, crop, crop, 3))
            return group.pixels

    def _load(self, group: _Group, run: Run) -> None:
        """Load a run of images; whoever loads a group's last has its batches embedded."""
        if self._is_dropped:
            return
        try:
            self._read_and_decode(group, run)
        except Exception as error:  # for the thread that has the shard
            self._done.put(error)
            return
        with self._lock:
            group.missing -= len(run.places)
            is_whole = not group.missing
        if is_whole:
            for start in range(0, len(group.items), self._size):
                self._worker.forwards.submit(self._embed, group, start)

    def _read_and_decode(self, group: _Group, run: Run) -> None:
        """Read all of a run, then decode each image into its place."""
        started = time.perf_counter()
        with self.stage("read"):
            contents = run.read()
        with self._lock:
            self.bytes_read += sum(len(each[0]) for each in contents if isinstance(each, tuple))
        self._worker.adapt_readers((time.perf_counter() - started) / len(contents))
        with self.stage("decode"):
            pixels = self._pixels(group)
            for place, content in zip(run.places, contents, strict=True):
                n = place - group.first
                group.outcomes[n] = self._decoded(group.items[n], content, pixels[n])

    def _decoded(
        self, item: Item, content: Content | Failure, place: NDArray[np.uint8]
    ) -> Row | Failure:
        identity = self._worker.job.identity
        image = loaded(content, identity.preprocessing, identity.decode, self._decode)
        if isinstance(image, Failure):
            return image
        picture, size, mtime = image
        place[:] = picture.pixels
        return Row(item.id, picture.width, picture.height, size, mtime, item.label, item.carried)

    def _embed(self, group: _Group, start: int) -> None:
        """Embed the batch that begins at this place of the group."""
        if self._is_dropped:
            return
        idle = self._worker.idle_since
        since = max(group.started, idle.get(get_ident(), 0.0))
        self._add("wait", time.perf_counter() - since)
        pixels = self._pixels(group)
        try:
            self._done.put(self._embedded(group, pixels[start : start + self._size], start))
        except Exception as error:
            self._done.put(error)
        with self._lock:
            group.left -= 1
            if not group.left:
                self._worker.buffers.append(pixels)
        idle[get_ident()] = time.perf_counter()

    def _embedded(self, group: _Group, pixels: NDArray[np.uint8], start: int) -> Batch:
        worker, end = self._worker, start + self._size
        items, outcomes = group.items[start:end], group.outcomes[start:end]
        problem = Failure("embed", "non_finite", "the model gave a value that is not finite")
        job = worker.job
        vectors = np.zeros((len(items), sum(job.dims.values())), job.identity.dtype)
        if any(isinstance(outcome, Row) for outcome in outcomes):
            with self.stage("embed"):
                try:
                    given = forward(worker, pixels)[: len(items)]
                except torch.OutOfMemoryError as error:
                    problem = Failure("embed", "out_of_memory", first_line(error))
                    given = np.full(vectors.shape, np.nan, np.float32)
                with np.errstate(over="ignore"):  # too much for float16 is infinite: a failure
                    vectors = given.astype(job.identity.dtype)
        finite = np.asarray(np.isfinite(vectors).all(axis=1))
        images, changed = list[Row | FailedItem](), 0
        for item, outcome, is_finite in zip(items, outcomes, finite, strict=True):
            if isinstance(outcome, Row):
                changed += item.size is not None and (
                    (outcome.size, outcome.mtime) != (item.size, item.mtime)
                )
                outcome = outcome if is_finite else problem
            images.append(
                FailedItem(item.id, item.uri, outcome, item.carried)
                if isinstance(outcome, Failure)
                else outcome
            )
        return Batch(group.first + start, images, vectors, changed)
