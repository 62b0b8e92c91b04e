"""Ways to run a ResNet on a GPU, for `gpu.py` to compare: torch's kernels one by one, the same in a
graph, a graph of the fused network as workers have it, and torch.compile, which resfeat has not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat.backbones.ours import default_pixels
from resfeat.backbones.weights import Weights, resolve
from resfeat.decoding.decode import decode
from resfeat.fidelity.parity import cosine
from resfeat.runtimes.cuda import Lane
from resfeat.runtimes.fused import fuse
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import FeatureSpec


@cache
def resolved(model: str, precision: str) -> Weights:
    return resolve(FeatureSpec(model=model, weights="random:0", precision=precision))


@cache
def pixels(photographs: Path, model: str, count: int) -> NDArray[np.uint8]:
    """So many of the photographs, as the model takes them, uint8 [count, H, W, 3]."""
    paths = sorted(photographs.iterdir())
    chosen = [paths[number % len(paths)] for number in range(count)]
    way = default_pixels(model)
    return np.stack([decode(path.read_bytes(), way, "turbo").pixels for path in chosen])


@cache
def expected(photographs: bytes, model: str, device: str, count: int) -> NDArray[np.float32]:
    """Their embeddings in fp32."""
    weights = resolved(model, "fp32")
    crop = weights.identity.preprocessing.crop
    given = np.frombuffer(photographs, np.uint8).reshape(count, crop, crop, 3)
    return TorchRuntime(weights.identity, weights.tensors, device).embed(given)


class Candidate:
    """One model, in one precision, run in one way."""

    def __init__(self, model: str, precision: str, way: str, device: str) -> None:
        self._model, self._way = model, way
        weights = resolved(model, precision)
        runtime = TorchRuntime(weights.identity, weights.tensors, device)
        self._device, self._embedder = runtime._device, runtime._embedder
        if way == "fused":
            self._embedder = fuse(self._embedder)
        elif way == "compile":
            backend = "inductor" if device == "cuda" else "eager"
            self._embedder = torch.compile(self._embedder, backend=backend)
        self._lane = Lane([self._embedder], self._device)

    def _on_lane(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode(), torch.cuda.stream(self._lane._stream):
            return run()

    def prepare(self, some: NDArray[np.uint8]) -> Callable[[], object]:
        """What runs it once, on pixels that are on the device already."""
        batch = torch.from_numpy(some).to(self._device)
        if self._way == "eager":
            return partial(self._on_lane, partial(self._embedder, batch))
        self._on_lane(partial(self._embedder, batch))  # which has cuDNN choose its kernels
        graph = self._on_lane(partial(self._lane.capture, self._embedder, batch.shape))
        self._on_lane(partial(graph.pixels.copy_, batch))
        return partial(self._on_lane, graph.replay.replay)

    def _embed(self, some: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(some).to(self._device)
        given = self._on_lane(partial(self._embedder, batch))
        torch.cuda.synchronize()
        return given.cpu().numpy()

    def cosine(self, some: NDArray[np.uint8]) -> float:
        """The least to fp32 on the same device."""
        theirs = expected(some.tobytes(), self._model, self._device.type, len(some))
        return float(cosine(self._embed(some), theirs).min())

    def elsewhere(self, some: NDArray[np.uint8]) -> str:
        """Whether an image gives other bits at another place of the batch."""
        order = np.random.default_rng(0).permutation(len(some))
        moved = self._embed(np.ascontiguousarray(some[order]))
        return "same bits" if np.array_equal(self._embed(some)[order], moved) else "OTHER BITS"

    def poisoned(self, some: NDArray[np.uint8]) -> str:
        """Whether it reads memory that it has not written: embed again with NaN in what is free."""
        before = self._embed(some)

        size = 2**24 if self._device.type == "cuda" else 2**16

        def poison() -> Tensor:
            return torch.cat(
                [torch.full((size,), torch.nan, device=self._device) for _ in range(8)]
            )

        self._on_lane(poison)
        return "same bits" if np.array_equal(before, self._embed(some)) else "OTHER BITS"
