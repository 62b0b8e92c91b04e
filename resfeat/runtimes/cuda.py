"""The torch runtime on a GPU, and what CUDA says when it fails."""

import platform
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat.errors import DeviceLostError, first_line
from resfeat.runtimes import GPU_BATCH
from resfeat.runtimes.embedder import Embedder
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import Identity

# Passes before the capture, in which cuDNN chooses its kernels and everything is set up.
WARM_UPS = 3
# One capture at a time: torch waits for the whole device before each, and CUDA allows no such wait
# while another thread captures.
_capturing = threading.Lock()


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
        if not re.search("CUDA error|cuDNN error", said):
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
    is computed. Every full batch of `GPU_BATCH` images replays one CUDA graph: the bits of an image
    depend neither on its place nor on how many images come at once. Fewer, which is what is left
    once memory runs short, are computed without a graph.
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
            self._own.lane = _Lane(self._embedder, self._device)
        lane, starts = self._own.lane, range(0, len(pixels), GPU_BATCH)
        return np.concatenate([lane.embed(pixels[i : i + GPU_BATCH]) for i in starts])


@dataclass(frozen=True)
class _Graph:
    """The forward pass of a full batch: what it reads, what it writes, and the way between."""

    pixels: Tensor  # uint8 [GPU_BATCH, H, W, 3]
    vectors: Tensor  # float32 [GPU_BATCH, D]
    replay: torch.cuda.CUDAGraph


class _Lane:
    """A thread's own way to the GPU. It is made at the thread's first batch, and so is its graph:
    what cuDNN has chosen belongs to the thread that made it choose."""

    def __init__(self, embedder: Embedder, device: torch.device) -> None:
        self._embedder = embedder
        self._device = device
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # To wait for it is to sleep; to wait for a stream takes a core from the decoders.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._graph: _Graph | None = None
        self._can_capture = True

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As the runtime, for at most GPU_BATCH images."""
        batch = torch.from_numpy(pixels)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            if graph := self._graph_for(batch):
                graph.pixels.copy_(batch, non_blocking=True)
                graph.replay.replay()
                vectors = graph.vectors
            else:
                vectors = self._embedder(batch.to(self._device, non_blocking=True))
            given = torch.empty(vectors.shape, pin_memory=self._device.type == "cuda")
            given.copy_(vectors, non_blocking=True)
            self._done.record()
        self._done.synchronize()
        return given.numpy()

    def _graph_for(self, batch: Tensor) -> _Graph | None:
        """The graph for this batch, captured at the first full one; None where there is none."""
        if len(batch) < GPU_BATCH:
            self._graph = None  # memory is short, and it holds some
        elif self._graph is None and self._can_capture:
            try:
                self._graph = self._capture(batch.shape)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a network of another library may do what no graph can
                self._can_capture = False
        return self._graph

    def _capture(self, shape: torch.Size) -> _Graph:
        with _capturing:
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
            for _ in range(WARM_UPS):
                self._embedder(pixels)
            graph = torch.cuda.CUDAGraph()
            # Loaders pin memory meanwhile, which ends a capture that minds other threads.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                vectors = self._embedder(pixels)
            return _Graph(pixels, vectors, graph)
