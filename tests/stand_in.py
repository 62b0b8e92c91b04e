"""A GPU made of CPU: all that `cuda.py` and `fused.py` use of CUDA, for tensors of the CPU.

A graph notes every operation with the memory that it reads and writes, and does the same again when
it is replayed, as CUDA's do: what is not copied in or out gives wrong embeddings here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resfeat.runtimes import cuda


class Recorder(TorchDispatchMode):
    """Notes the operations of this thread."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        self._steps.append((function, args, kwargs or {}, given))
        return given


class Graph:
    def __init__(self) -> None:
        self.steps: list[Any] = []

    def replay(self) -> None:
        for function, args, kwargs, given in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(given), tree_leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)


@contextmanager
def capture(graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
    with Recorder(graph.steps):
        yield


class Stream:
    pass


class Event:
    def __init__(self, blocking: bool) -> None:
        self._recorded = False

    def record(self) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        assert self._recorded


def convolution_relu(x, weight, bias, stride, padding, dilation, groups):
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu_()


def convolution_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y.add_(z, alpha=alpha).relu_()


CUDNN = {
    "cudnn_convolution_relu": convolution_relu,
    "cudnn_convolution_add_relu": convolution_add_relu,
}
PATCHES: dict[str, Any] = {
    "CUDAGraph": Graph,
    "graph": capture,
    "Stream": Stream,
    "stream": lambda stream: nullcontext(),
    "Event": Event,
    "synchronize": lambda: None,
    "set_per_process_memory_fraction": lambda share: None,
}


@contextmanager
def gpu(device: str) -> Iterator[None]:
    """Within it a CudaRuntime for this device can be built: "cuda" is the real one, for "cpu" its
    calls to torch.cuda are answered here, and the fixed batch is smaller."""
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(patch.multiple(torch.cuda, **PATCHES))
            stack.enter_context(patch.multiple(torch, **CUDNN))
            stack.enter_context(patch.object(cuda, "GPU_BATCH", 16))
        yield


def runtime(weights: Any, device: str, share: float = 1.0) -> cuda.CudaRuntime:
    return cuda.CudaRuntime(weights.identity, weights.tensors, share, device)
