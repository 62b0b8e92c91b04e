"""ResNets in numbers: which convolutions a network has, its shapes, parameters and GFLOPs.

Worked out without torch, whose import alone takes seconds. `resnet.py` builds the networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

# What is added to the output of a block's convolutions (section 3.3, and section 2 of the highway
# paper). Where shapes are equal, A and B add the input itself. Where they differ, A adds the input
# subsampled and padded with zero channels, B a 1x1 projection of it. C projects everywhere.
Shortcut = Literal["A", "B", "C", "none", "highway"]


class Convolution(NamedTuple):
    """inputs: channels of one group. side: of the map that it gives. A gate has biases; any other
    convolution has a batch norm behind it."""

    inputs: int
    outputs: int
    kernel: int
    side: int
    is_gate: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2

    @property
    def parameters(self) -> int:
        return self.weights + self.outputs * (1 if self.is_gate else 2)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """depths: blocks in each stage. widths: of each stage's 3x3 convolutions, for one group of
    `group_width` 64. groups, group_width: of a bottleneck's 3x3 convolution, as ResNeXt and wide
    ResNets vary them. stem: a 7x7 convolution and pooling, or CIFAR's one 3x3 convolution.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    groups: int = 1
    group_width: int = 64
    shortcut: Shortcut = "B"
    stem: Literal["imagenet", "cifar"] = "imagenet"

    @property
    def expansion(self) -> int:
        """Channels that a block gives for each of its width."""
        return 4 if self.bottleneck else 1

    def inner(self, width: int) -> int:
        """Channels of a bottleneck's 3x3 convolution, over all groups."""
        return width * self.group_width // 64 * self.groups

    def shapes(self, crop: int) -> dict[str, tuple[int, ...]]:
        """The feature map (C, h, w) of each tap, for one picture of crop x crop pixels."""
        side = crop if self.stem == "cifar" else _halved(_halved(crop))
        given: dict[str, tuple[int, ...]] = {"stem": (self.widths[0], side, side)}
        for number, width in enumerate(self.widths, start=1):
            side = _halved(side) if number > 1 else side
            given[f"layer{number}"] = (width * self.expansion, side, side)
        return given | {"avgpool": given[f"layer{len(self.widths)}"]}

    def parameter_count(self) -> int:
        return sum(each.parameters for each in self.convolutions(1))

    def gflops(self, crop: int) -> float:
        """Billions of multiply-adds for one picture."""
        return sum(each.weights * each.side**2 for each in self.convolutions(crop)) / 1e9

    def convolutions(self, crop: int) -> Iterator[Convolution]:
        """All of them, in the order of the paper; a block's shortcut comes last."""
        (inputs, before, _), *stages, _ = self.shapes(crop).values()
        if self.stem == "cifar":
            yield Convolution(3, inputs, 3, crop)
        else:
            yield Convolution(3, inputs, 7, _halved(crop))
        for stage, (outputs, side, _) in enumerate(stages):
            width = self.widths[stage]
            for block in range(self.depths[stage]):
                if self.bottleneck:
                    inner = self.inner(width)
                    yield Convolution(inputs, inner, 1, before)
                    yield Convolution(inner // self.groups, inner, 3, side)
                    yield Convolution(inner, outputs, 1, side)
                else:
                    yield Convolution(inputs, width, 3, side)
                    yield Convolution(width, width, 3, side)
                keeps_shape = inputs == outputs and not (stage and block == 0)
                if self.shortcut == "highway" and keeps_shape:
                    yield Convolution(inputs, outputs, 3, side, is_gate=True)
                elif self.shortcut == "C" or (self.shortcut == "B" and not keeps_shape):
                    yield Convolution(inputs, outputs, 1, side)
                inputs, before = outputs, side


def imagenet(depth: int, **changes: object) -> Architecture:
    """A column of table 1, by its number of weighted layers."""
    depths = {
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
    }
    return Architecture(depths=depths[depth], bottleneck=depth >= 50, **changes)  # type: ignore[arg-type]


def cifar(depth: int, shortcut: Shortcut = "A") -> Architecture:
    """Section 4.2: three stages of n blocks on 32x32, 16x16 and 8x8 maps make 6n + 2 layers."""
    blocks = (depth - 2) // 6
    return Architecture(depths=(blocks,) * 3, widths=(16, 32, 64), shortcut=shortcut, stem="cifar")


def _halved(side: int) -> int:
    """A side after a stride of 2, with the padding that keeps it at a stride of 1."""
    return (side + 1) // 2
