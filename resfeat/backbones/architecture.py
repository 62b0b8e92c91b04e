"""ResNets in numbers: their convolutions, and what follows from those: shapes, parameters, GFLOPs.

`resnet.py` builds networks from them. They are apart since importing torch takes seconds.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

# What is added to the output of a block's convolutions (section 3.3, and section 2 of the highway
# paper). Where shapes are equal, A and B add the input itself. Where they differ, A adds the input
# subsampled and padded with zero channels, B a 1x1 projection of it. C projects everywhere.
Shortcut = Literal["A", "B", "C", "none", "highway"]


class Convolution(NamedTuple):
    """A batch norm follows, unless it has biases. Padding keeps the side at a stride of 1."""

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs // self.groups * self.outputs * self.kernel**2

    def side(self, side: int) -> int:
        """The side of the map that it gives for a map of this side."""
        return math.ceil(side / self.stride)


class BlockNumbers(NamedTuple):
    inputs: int
    outputs: int
    stride: int
    shortcut: Shortcut
    convolutions: list[Convolution]
    beside: Convolution | None  # the shortcut's: a projection, or a highway's gate


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """widths: of each stage's 3x3 convolutions, for one group of `group_width` 64. groups,
    group_width: of a bottleneck's 3x3 convolution, as ResNeXt and wide ResNets vary them."""

    depths: tuple[int, ...]  # blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    groups: int = 1
    group_width: int = 64
    shortcut: Shortcut = "B"
    stem: Literal["imagenet", "cifar"] = "imagenet"  # a 7x7 convolution and pooling, or one 3x3

    @property
    def expansion(self) -> int:
        """Channels that a block gives for each channel of its width."""
        return 4 if self.bottleneck else 1

    @property
    def first(self) -> Convolution:
        width = self.widths[0]
        return Convolution(3, width, 3) if self.stem == "cifar" else Convolution(3, width, 7, 2)

    def stages(self) -> list[list[BlockNumbers]]:
        """The blocks of each stage. The first block of all stages but the first strides."""
        inputs, stages = self.widths[0], list[list[BlockNumbers]]()
        for width, depth in zip(self.widths, self.depths, strict=True):
            first = self._block(inputs, 2 if stages else 1, width)
            inputs = first.outputs
            stages.append([first, *[self._block(inputs, 1, width)] * (depth - 1)])
        return stages

    def _block(self, inputs: int, stride: int, width: int) -> BlockNumbers:
        outputs = width * self.expansion
        if self.bottleneck:  # figure 5, right: 1x1 reduces, 3x3 works (and strides), 1x1 restores
            inner = width * self.group_width // 64 * self.groups
            convolutions = [
                Convolution(inputs, inner, 1),
                Convolution(inner, inner, 3, stride, self.groups),
                Convolution(inner, outputs, 1),
            ]
        else:  # figure 5, left
            convolutions = [Convolution(inputs, width, 3, stride), Convolution(width, width, 3)]
        keeps_shape = stride == 1 and inputs == outputs
        shortcut, beside = self.shortcut, None
        if shortcut == "C" or (shortcut == "B" and not keeps_shape):
            beside = Convolution(inputs, outputs, 1, stride)
        elif shortcut == "highway" and keeps_shape:
            beside = Convolution(inputs, outputs, 3, bias=True)
        elif shortcut == "highway":
            shortcut = "none"  # as in the highway paper, plain layers change the shape
        return BlockNumbers(inputs, outputs, stride, shortcut, convolutions, beside)

    def shapes(self, crop: int) -> dict[str, tuple[int, ...]]:
        """The feature map (C, h, w) of each tap, for one picture of crop x crop pixels."""
        side = self.first.side(crop)
        side = side if self.stem == "cifar" else math.ceil(side / 2)  # what follows is pooling
        given: dict[str, tuple[int, ...]] = {"stem": (self.widths[0], side, side)}
        for number, width in enumerate(self.widths, start=1):
            side = math.ceil(side / 2) if number > 1 else side
            given[f"layer{number}"] = (width * self.expansion, side, side)
        return given | {"avgpool": given[f"layer{len(self.widths)}"]}

    def parameter_count(self) -> int:
        return sum(c.weights + c.outputs * (1 if c.bias else 2) for c, _ in self._maps(1))

    def gflops(self, crop: int) -> float:
        """Billions of multiply-adds for one picture."""
        return sum(c.weights * side**2 for c, side in self._maps(crop)) / 1e9

    def _maps(self, crop: int) -> list[tuple[Convolution, int]]:
        """All convolutions, each with the side of the map that it gives."""
        maps = [(self.first, self.first.side(crop))]
        side = self.shapes(crop)["stem"][1]
        for block in itertools.chain(*self.stages()):
            for each in block.convolutions:
                side = each.side(side)
                maps.append((each, side))
            maps += [(block.beside, side)] if block.beside else []
        return maps


def imagenet(depth: int, **changes: object) -> Architecture:
    """A column of table 1, by its number of weighted layers."""
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
              152: (3, 8, 36, 3)}  # fmt: skip
    return Architecture(depths=depths[depth], bottleneck=depth >= 50, **changes)  # type: ignore[arg-type]


def cifar(depth: int, shortcut: Shortcut = "A") -> Architecture:
    """Section 4.2: three stages of n blocks on 32x32, 16x16 and 8x8 maps make 6n + 2 layers."""
    blocks = (depth - 2) // 6
    return Architecture(depths=(blocks,) * 3, widths=(16, 32, 64), shortcut=shortcut, stem="cifar")
