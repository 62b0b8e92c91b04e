"""A worker: one model on one device, and the threads that its shards share."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import BoundedSemaphore, Event, Lock, get_ident

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat import runtimes
from resfeat.dataset import Layout, check_lease, embeddings_schema
from resfeat.decoding import MAX_PIXELS, PIXEL_BYTES, Picture, Room, decode
from resfeat.errors import DecoderHungError, Failure, ResfeatError, Stopped, first_line
from resfeat.plan import Shard
from resfeat.runtimes import Network, keeps_to_the_cpu
from resfeat.runtimes.cuda import why_no_gpu
from resfeat.runtimes.hardware import cpu_count, memory_bytes
from resfeat.runtimes.torch import use_one_core
from resfeat.spec import Decode, Identity, Preprocessing, RuntimeOptions
from resfeat.worker.messages import Job, Placement

# An image that has been decoded for so long hangs; the slowest that is allowed takes a few seconds.
HUNG_SECONDS = 60.0
LONG_SECONDS = 5.0  # for one image: most that take longer never end
# Reading an image that takes longer than the first waits for a disk or a store; one that takes less
# than the second comes out of memory.
SLOW_SECONDS, FAST_SECONDS = 0.002, 0.0002
# Pictures of fewer pixels are decoded without a look at memory. A worker without any larger ones
# takes about so much.
SMALL_PIXELS, WORKER_BYTES = 8_000_000, 2 * 1024**3


def place_here(options: RuntimeOptions, identity: Identity) -> Placement:
    """Where the only worker of this process runs. Raises ResfeatError without the GPU asked for."""
    gpus = 0.0
    if not keeps_to_the_cpu(options, identity.precision):
        if torch.cuda.is_available():
            gpus = 1.0
        elif options.gpus_per_worker:
            raise ResfeatError(
                f"a GPU was asked for, and {why_no_gpu()}, or give --gpus-per-worker 0 to run on "
                "the CPU"
            )
    return Placement.of(options, identity, gpus, options.cpus_per_worker or cpu_count())


def network_for(job: Job, placement: Placement, tensors: Mapping[str, Tensor]) -> Network:
    """The network as the workers take it: made once, sent to each."""
    quantised = Layout(job.output).quantised
    return runtimes.prepare(placement.runtime, job.identity, tensors, quantised)


class Worker:
    """The model and the thread pools that the shards of one worker share.

    Forward passes run one batch to a thread, each on a single core: with more threads inside a
    forward pass the last bits of an embedding depend on how many there are.
    """

    def __init__(self, job: Job, placement: Placement, network: Network) -> None:
        self.job = job
        self.placement = placement
        self.layout = Layout(job.output, job.share)
        if job.token:
            self.layout.fence.check = partial(check_lease, self.layout, job.token)
        self.forward_threads = placement.forward_threads
        size = placement.batch_size
        self.fits = size  # images that the device's memory is thought to hold at once
        with _memory_told(placement):
            self.runtime = runtimes.start(
                network,
                device=placement.device,
                threads=self.forward_threads,
                batch_size=size,
                share=placement.gpus,
            )
        self.progress: dict[Shard, tuple[int, int]] = {}  # images done and failed, by shard in hand
        self.stopping = Event()  # set it to have shards in hand raise Stopped soon
        self.dropped: set[Shard] = set()  # of shards in hand, those that are to do so
        self.decoding_since: dict[int, float] = {}  # by thread
        self.idle_since: dict[int, float] = {}  # by forward thread
        self._threads_loading = placement.cpus + job.reads_ahead
        self.loaders = _threads("load", self._threads_loading)
        self.forwards = _threads("forward", self.forward_threads)
        self.buffers: list[NDArray[np.uint8]] = []  # free ones, of one shape
        # Threads beyond the cores only take the interpreter's lock from each other, unless files
        # come slowly: then some read while others decode, until they come out of memory again. A
        # single hiccup of the machine may look like slow files.
        self._loading, self._most_loading = 0, placement.cpus
        self._loads: deque[Callable[[], None]] = deque()  # that wait for a thread
        self.decoding = BoundedSemaphore(placement.cpus)
        self.feeding = Lock()
        self._lock = Lock()
        self._room = Room(pixels_at_once(placement.cpus))

    def schema(self, parity: Mapping[str, float] | None) -> pa.Schema:
        """Of the rows. parity: what they say of how near they are to the reference."""
        job, measured = self.job, {"parity": parity, "quantised": self.job.quantised}
        return embeddings_schema(
            job.identity,
            job.dims,
            with_label=job.with_label,
            carried=job.carried,
            measured={name: value for name, value in measured.items() if value},
        )

    def embed(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embeddings [N, D] of pictures uint8 [H, W, 3], in batches and threads as in a run. Raises
        ResfeatError where the device's memory does not hold a single one."""
        size = self.placement.batch_size
        batches = []
        for start in range(0, len(pictures), size):
            some = pictures[start : start + size]
            batch = self.runtime.empty((size, *some[0].shape))
            batch[: len(some)] = some
            batches.append(self.forwards.submit(forward, self, batch))
        with _memory_told(self.placement):
            return np.concatenate([batch.result() for batch in batches])[: len(pictures)]

    def load(self, task: Callable[[], None]) -> None:
        """Have a loader do this, which raises nothing, after what was given before."""
        with self._lock:
            self._loads.append(task)
            if self._loading >= self._most_loading:
                return
            self._loading += 1
        self.loaders.submit(self._load)

    def _load(self) -> None:
        # A task is taken when it can begin. Where threads waited for their turn with one in hand,
        # others came before them time and again, and the end of a shard waited in their hands.
        while True:
            with self._lock:
                if not self._loads or self._loading > self._most_loading:
                    self._loading -= 1
                    return
                task = self._loads.popleft()
            task()

    def adapt_readers(self, seconds: float) -> None:
        """Let one more thread load images where reading one was slow, and one fewer where it was
        fast; never fewer than there are cores. seconds: that reading an image took."""
        more = (seconds > SLOW_SECONDS) - (seconds < FAST_SECONDS)
        with self._lock:
            most = min(self._most_loading + more, self._threads_loading)
            self._most_loading = max(most, self.placement.cpus)

    def decode(self, data: bytes, preprocessing: Preprocessing, way: Decode) -> Picture | Failure:
        """As `decode.decode`, watched by `check_decoders`."""
        self.decoding_since[get_ident()] = time.monotonic()
        try:
            return decode(data, preprocessing, way, self._room_for)
        finally:
            self.decoding_since.pop(get_ident(), None)

    def _room_for(self, pixels: int) -> AbstractContextManager[object]:
        return nullcontext() if pixels < SMALL_PIXELS else self._waiting_for_room(pixels)

    @contextmanager
    def _waiting_for_room(self, pixels: int) -> Iterator[None]:
        del self.decoding_since[get_ident()]  # while it waits nothing hangs
        with self._room.of(pixels):
            self.decoding_since[get_ident()] = time.monotonic()
            yield

    def check_wanted(self, shard: Shard) -> None:
        """Raise Stopped where this shard is not to be finished here."""
        if self.stopping.is_set() or shard in self.dropped:
            raise Stopped("left unfinished")

    def check_decoders(self) -> None:
        """Raise DecoderHungError where an image has been decoded for too long."""
        if self._decodes_for(HUNG_SECONDS):
            raise DecoderHungError

    def may_hang(self) -> bool:
        """Whether an image has been decoded for so long that it may hang its decoder."""
        return self._decodes_for(LONG_SECONDS)

    def _decodes_for(self, seconds: float) -> bool:
        now = time.monotonic()
        return any(now - since > seconds for since in list(self.decoding_since.values()))

    def close(self) -> None:
        """Let the threads go; whatever has not begun is dropped."""
        self.forwards.shutdown(wait=False, cancel_futures=True)
        self.loaders.shutdown(wait=False, cancel_futures=True)


def pixels_at_once(cpus: int) -> int:
    """Pixels of large pictures that a worker of so many cores may decode at a time: as many as fit
    into its share of the memory, which is that of the cores."""
    memory = memory_bytes() * cpus // max(cpus, cpu_count())
    return max(MAX_PIXELS, (memory - WORKER_BYTES) // PIXEL_BYTES)


@contextmanager
def _memory_told(placement: Placement) -> Iterator[None]:
    """Say what can be done where the device's memory does not hold a single image."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        memory, next_step = "the device's memory", "see what else is on it"
        if 0 < placement.gpus < 1:
            memory = f"a worker's share ({placement.gpus:g}) of the GPU's memory"
            next_step = "give a larger --gpus-per-worker"
        raise ResfeatError(
            f"{memory} does not hold the network and one image: {next_step}, or give a smaller "
            f"--model ({first_line(error)})"
        ) from error


def _threads(name: str, count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, name, initializer=use_one_core)


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
