"""Ways to run a ResNet on a GPU, for `gpu.py` to compare: as the workers do, and with the bias, the
shortcut and the ReLU after a convolution done in one go. None of the latter is used by resfeat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resfeat.backbones.ours import default_pixels
from resfeat.backbones.resnet import Block, ResNet
from resfeat.backbones.weights import Weights, resolve
from resfeat.decoding.decode import decode
from resfeat.fidelity.parity import cosine
from resfeat.runtimes.cuda import _Lane
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import FeatureSpec

# relu(convolution(x) + bias + shortcut), where there is a shortcut.
Fused = Callable[[nn.Conv2d, Tensor, Tensor | None], Tensor]


def by_hand(conv: nn.Conv2d, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """One after the other: it shows that the others are put into their places rightly."""
    y = conv(x)
    return (y if shortcut is None else y + shortcut).relu_()


def cudnn(conv: nn.Conv2d, x: Tensor, shortcut: Tensor | None) -> Tensor:
    shape = conv.stride, conv.padding, conv.dilation, conv.groups
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *shape)
    return torch.cudnn_convolution_add_relu(x, conv.weight, shortcut, 1.0, conv.bias, *shape)


def jiterator(conv: nn.Conv2d, x: Tensor, shortcut: Tensor | None) -> Tensor:
    shape = conv.stride, conv.padding, conv.dilation, conv.groups
    y = torch.conv2d(x, conv.weight, None, *shape)
    bias = conv.bias.view(1, -1, 1, 1)
    return _kernel("b")(y, bias) if shortcut is None else _kernel("b + c")(y, bias, shortcut)


@cache
def _kernel(added: str) -> Callable[..., Tensor]:
    from torch.cuda.jiterator import _create_jit_fn

    names = ", ".join(f"T {name}" for name in f"a + {added}".split(" + "))
    return _create_jit_fn(
        f"template <typename T> T fused({names}) "
        f"{{ T sum = a + {added}; return sum > T(0) ? sum : T(0); }}"
    )


FUSED: dict[str, Fused] = {"by hand": by_hand, "cudnn": cudnn, "jiterator": jiterator}


class _FusedBlock(nn.Module):
    def __init__(self, block: Block, fused: Fused) -> None:
        super().__init__()
        self.block, self.fused = block, fused

    def forward(self, x: Tensor) -> Tensor:
        block, y = self.block, x
        for number in range(1, block.depth):
            y = self.fused(getattr(block, f"conv{number}"), y, None)
        return self.fused(getattr(block, f"conv{block.depth}"), y, block.downsample(x))


class _FusedStem(nn.Module):
    def __init__(self, conv: nn.Conv2d, fused: Fused) -> None:
        super().__init__()
        self.conv, self.fused = conv, fused

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(self.conv, x, None)


def fuse(network: ResNet, fused: Fused) -> None:
    """In place, for a network whose batch norms are folded."""
    network.conv1, network.relu = _FusedStem(network.conv1, fused), nn.Identity()
    for name in network.stages:
        blocks = getattr(network, name)
        setattr(network, name, nn.Sequential(*(_FusedBlock(each, fused) for each in blocks)))


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
        if way in FUSED:
            self._embedder = copy.deepcopy(self._embedder)
            fuse(self._embedder.network, FUSED[way])
        elif way == "compile":
            backend = "inductor" if device == "cuda" else "eager"
            self._embedder = torch.compile(self._embedder, backend=backend)
        self._lane = _Lane(self._embedder, self._device)

    def _on_lane(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode(), torch.cuda.stream(self._lane._stream):
            return run()

    def prepare(self, some: NDArray[np.uint8]) -> Callable[[], object]:
        """What runs it once, on pixels that are on the device already."""
        batch = torch.from_numpy(some).to(self._device)
        if self._way == "eager":
            return partial(self._on_lane, partial(self._embedder, batch))
        graph = self._on_lane(partial(self._lane._capture, batch.shape))
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
