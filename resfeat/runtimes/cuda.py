"""The torch runtime on a GPU, and what CUDA says when it fails."""

import platform
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat.errors import DeviceLostError, first_line
from resfeat.runtimes import GPU_BATCH
from resfeat.runtimes.embedder import Embedder
from resfeat.runtimes.fused import fuse
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import Identity

# A full batch is computed whole, or in so many pieces.
PIECES = (1, 2, 4, 8)
# One thread at a time: torch waits for the whole device before each capture, and CUDA allows no
# such wait while another thread captures.
_choosing = threading.Lock()


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn CUDA's own errors into torch.OutOfMemoryError, or DeviceLostError: after any other, no
    call of this process to the GPU succeeds."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = first_line(error)
        if not re.search("CUDA error|cuDNN error", said) or "NOT_SUPPORTED" in said:
            raise
        if re.search("out of memory|ALLOC_FAILED", said):  # of what torch does not allocate itself
            raise torch.OutOfMemoryError(said) from error
        raise DeviceLostError(
            f"the GPU of {platform.node()} failed ({said}): see what nvidia-smi says there, and "
            "give the same command again, it resumes"
        ) from error


def why_no_gpu() -> str:
    """Why torch has no GPU here, and what mends that; to be asked only where it has none."""
    if torch.version.cuda is None:
        return "torch is built without CUDA: install a CUDA build of it"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        said = ""
    except RuntimeError as error:
        said = str(error)
    if too_old := re.search(r"too old \(found version (\d+)\)", said):
        major, minor = divmod(int(too_old[1]) // 10, 100)  # 11040 is CUDA 11.4
        return (
            f"the NVIDIA driver is too old (it can do CUDA {major}.{minor}, torch is built for "
            f"{torch.version.cuda}): install a newer driver, or a torch for CUDA {major}"
        )
    if "no NVIDIA driver" in said:
        return "torch finds no NVIDIA driver: install it"
    return "torch sees no GPU: check the driver and CUDA_VISIBLE_DEVICES"


class CudaRuntime(TorchRuntime):
    """An `Embedder` on a GPU, with `share` of its memory.

    Each calling thread has a stream of its own, so that the copies of one batch run while another
    is computed. Every full batch of `GPU_BATCH` images goes the same `_Way`: the bits of an image
    depend neither on its place nor on how many images come at once. Fewer, which is what is left
    once memory runs short, are computed as they come.
    """

    @device_errors()
    def __init__(
        self, identity: Identity, tensors: Mapping[str, Tensor], share: float, device: str = "cuda"
    ) -> None:
        if share < 1:
            # No worker takes another's memory, for want of which cuDNN would choose other kernels.
            torch.cuda.set_per_process_memory_fraction(share)
        super().__init__(identity, tensors, device)
        torch.cuda.synchronize()  # the threads' own streams do not wait for these copies
        self._own = threading.local()

    @device_errors()
    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Zeros, in memory that a GPU can copy from by itself."""
        pinned = self._device.type == "cuda"
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned).numpy()

    @device_errors()
    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 [N, D] of RGB pixels uint8 [N, H, W, 3].

        Raises torch.OutOfMemoryError, and DeviceLostError where the GPU has failed.
        """
        if not hasattr(self._own, "lane"):
            embedders = [each for each in (fuse(self._embedder), self._embedder) if each]
            self._own.lane = Lane(embedders, self._device)
        lane, starts = self._own.lane, range(0, len(pixels), GPU_BATCH)
        vectors = np.concatenate([lane.embed(pixels[i : i + GPU_BATCH]) for i in starts])
        self.steady = self.steady and lane.steady
        return vectors


@dataclass(frozen=True)
class Graph:
    """A captured forward pass: what it reads, what it writes, and the way between."""

    pixels: Tensor  # uint8 [size, H, W, 3]
    vectors: Tensor  # float32 [size, D]
    replay: torch.cuda.CUDAGraph


@dataclass(frozen=True)
class _Way:
    """How a full batch is computed: by which network, in pieces of which size, and by its graph
    where it can be captured."""

    embedder: Embedder
    size: int
    graph: Graph | None = None

    def embed(self, piece: Tensor, device: torch.device) -> Tensor:
        """Embeddings on the device of `size` images."""
        if self.graph is None:
            return self.embedder(piece.to(device, non_blocking=True))  # type: ignore[no-any-return]
        self.graph.pixels.copy_(piece, non_blocking=True)
        self.graph.replay.replay()
        return self.graph.vectors


class Lane:
    """A thread's own way to the GPU, by the first of several networks that serves. The way is
    chosen at the thread's first batch: what cuDNN has chosen belongs to the thread that made it
    choose."""

    def __init__(self, embedders: Sequence[Embedder], device: torch.device) -> None:
        self._embedders = embedders
        self._device = device
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # To wait for it is to sleep; to wait for a stream takes a core from the decoders.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._way: _Way | None = None
        self.steady = True

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As the runtime, for at most GPU_BATCH images."""
        batch = torch.from_numpy(pixels)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            way = self._way_for(batch)
            pieces = torch.split(batch, way.size)
            vectors = [self._leave(way.embed(piece, self._device)) for piece in pieces]
            self._done.record()
        self._done.synchronize()
        return np.concatenate([each.numpy() for each in vectors])

    def _leave(self, vectors: Tensor) -> Tensor:
        """Have a copy made in the CPU's memory, to be there once the GPU is done."""
        given = torch.empty(vectors.shape, pin_memory=self._device.type == "cuda")
        return given.copy_(vectors, non_blocking=True)

    def _way_for(self, batch: Tensor) -> _Way:
        if len(batch) < GPU_BATCH:  # memory is short, and a graph holds some
            self._way = replace(self._way, graph=None) if self._way else None
            return _Way(self._way.embedder if self._way else self._embedders[-1], len(batch))
        if self._way is None:
            with _choosing:
                self._way = self._choose(batch.shape)
        return self._way

    def _choose(self, shape: torch.Size) -> _Way:
        """The fastest way in which an image has the same bits wherever it lies.

        Some of cuDNN's kernels divide the work of a convolution among the multiprocessors so that
        the order of additions depends on the place; how many images there are decides whether it
        takes one of those. (On an H100: 128 images for the last stage of ResNet-50, in bf16.)
        """
        for embedder in self._embedders:
            for pieces in PIECES:
                piece = torch.Size((GPU_BATCH // pieces, *shape[1:]))
                try:
                    with device_errors():
                        if self._is_steady(embedder, piece):
                            return self._captured(embedder, piece)
                except torch.OutOfMemoryError:
                    continue
                except RuntimeError:  # cuDNN has no such kernel for this network
                    break
        self.steady = False
        return _Way(self._embedders[-1], GPU_BATCH)

    def _is_steady(self, embedder: Embedder, shape: torch.Size) -> bool:
        """Whether images get the same bits at other places, and in memory full of NaN."""
        chance = torch.Generator(self._device).manual_seed(0)
        pixels = torch.randint(256, shape, generator=chance, dtype=torch.uint8, device=self._device)
        # About as much as a forward pass takes, which now gets this memory.
        torch.full((8 * pixels.numel(),), torch.nan, device=self._device)
        vectors = embedder(pixels)
        return torch.equal(embedder(pixels.flip(0)), vectors.flip(0)) and torch.equal(
            embedder(pixels.roll(1, 0)), vectors.roll(1, 0)
        )

    def _captured(self, embedder: Embedder, shape: torch.Size) -> _Way:
        """By a graph, unless a network of another library does what no graph can."""
        try:
            return _Way(embedder, shape[0], self.capture(embedder, shape))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return _Way(embedder, shape[0])

    def capture(self, embedder: Embedder, shape: torch.Size) -> Graph:
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        graph = torch.cuda.CUDAGraph()
        # Loaders pin memory meanwhile, which ends a capture that minds other threads.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            vectors = embedder(pixels)
        return Graph(pixels, vectors, graph)
