"""Headless ResNets: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016.

The networks of the paper's table 1 and of its section 4.2 (CIFAR-10), the plain networks that it
compares them with, and three relatives that change one number or one connection each: wide ResNets
(Zagoruyko & Komodakis, 2016), ResNeXt (Xie et al., 2017) and gated, "highway" shortcuts
(Srivastava, Greff, Schmidhuber, "Training Very Deep Networks", 2015).

This is the variant that torchvision publishes weights for: a bottleneck strides on its 3x3
convolution, not on the first 1x1 as the paper's own networks do. Parameter names are torchvision's,
so its checkpoints load strictly once `fc` is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from resfeat.backbones.backbone import Backbone

# What is added to the output of a block's convolutions (section 3.3, and section 2 of the highway
# paper). Where shapes are equal, A and B add the input itself. Where they differ, A adds the input
# subsampled and padded with zero channels, B a 1x1 projection of it. C projects everywhere.
Shortcut = Literal["A", "B", "C", "none", "highway"]

# Opens the way for the input when training begins: the transform gate starts at sigmoid(-1) = 0.27.
GATE_BIAS = -1.0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A ResNet in numbers.

    depths: blocks in each stage. widths: of each stage's 3x3 convolutions, for one group of
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


class Block(nn.Module):
    """Convolutions, and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, kind: Shortcut) -> None:
        super().__init__()
        self.kind = kind
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        self.downsample = nn.Sequential()
        if kind == "highway" and same:
            self.gate = conv(inputs, outputs, 3, bias=True)
        elif kind == "highway":
            self.kind = "none"  # as in the highway paper, plain layers change the shape
        elif kind == "A" and not same:
            self.downsample = nn.Sequential(SubsampleAndPad(stride, outputs - inputs))
        elif kind == "C" or (kind == "B" and not same):
            self.downsample = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    @property
    def adds(self) -> bool:
        """Whether the shortcut is added to what the convolutions give."""
        return self.kind in ("A", "B", "C")

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm behind the last convolution."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """The block's convolutions, up to the last batch norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return self.relu(self.residual(x))  # type: ignore[no-any-return]
        if self.kind == "highway":
            transform = torch.sigmoid(self.gate(x))
            return self.relu(self.residual(x)) * transform + x * (1 - transform)  # type: ignore[no-any-return]
        return self.relu(self.residual(x) + self.downsample(x))  # type: ignore[no-any-return]


class BasicBlock(Block):
    """Figure 5, left: two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, architecture: Architecture) -> None:
        super().__init__(inputs, width, stride, architecture.shortcut)
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))  # type: ignore[no-any-return]


class Bottleneck(Block):
    """Figure 5, right: 1x1 reduces, 3x3 works (and strides), 1x1 restores four times the width."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, architecture: Architecture) -> None:
        outputs = width * self.expansion
        super().__init__(inputs, outputs, stride, architecture.shortcut)
        groups = architecture.groups
        inner = width * architecture.group_width // 64 * groups
        self.conv1 = conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, groups=groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))  # type: ignore[no-any-return]


class SubsampleAndPad(nn.Module):
    """Option A: every `stride`-th pixel, and `channels` more channels of zeros."""

    def __init__(self, stride: int, channels: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))


def conv(
    inputs: int, outputs: int, size: int, stride: int = 1, *, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps height and width (at stride 1); batch norm supplies the bias."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def _halved(side: int) -> int:
    """A side after a stride of 2, with the padding that keeps it at a stride of 1."""
    return (side + 1) // 2


class ResNet(Backbone):
    """A ResNet up to its last feature map; `taps` names the maps that it can give.

    "stem" is what the first stage sees, "layer1" and so on are the stages. "avgpool" is the last
    stage again, under the name of the pooling that turns it into the embedding.
    """

    head = ("fc",)  # what torchvision puts on top, to be left out of a checkpoint

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        inputs = architecture.widths[0]
        imagenet_stem = architecture.stem == "imagenet"
        self.conv1 = conv(3, inputs, 7, stride=2) if imagenet_stem else conv(3, inputs, 3)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet_stem else nn.Identity()

        block = Bottleneck if architecture.bottleneck else BasicBlock
        self.stages: list[str] = []
        shape = zip(architecture.widths, architecture.depths, strict=True)
        for number, (width, depth) in enumerate(shape, start=1):
            blocks = []
            for position in range(depth):
                # Each stage after the first halves height and width, in its first block.
                stride = 2 if number > 1 and position == 0 else 1
                blocks.append(block(inputs, width, stride, architecture))
                inputs = width * block.expansion
            self.stages.append(f"layer{number}")
            setattr(self, self.stages[-1], nn.Sequential(*blocks))
        self.taps = ("stem", *self.stages, "avgpool")

    def shapes(self, crop: int) -> dict[str, tuple[int, ...]]:
        # Worked out, since running the network without values costs seconds of imports.
        inputs, side = self.conv1.out_channels, crop
        if isinstance(self.maxpool, nn.MaxPool2d):
            side = _halved(_halved(side))
        given: dict[str, tuple[int, ...]] = {"stem": (inputs, side, side)}
        for number, stage in enumerate(self.stages):
            side = _halved(side) if number else side
            channels = getattr(self, stage)[-1].last_norm.num_features
            given[stage] = (channels, side, side)
        return given | {"avgpool": given[self.stages[-1]]}

    def feature_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Run the network on `x`, float [N, 3, H, W], and give each tap's map [N, C, h, w]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        yield "stem", x
        for name in self.stages:
            x = getattr(self, name)(x)
            yield name, x
        yield "avgpool", x

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """The feature maps of the named `layers`, in one pass."""
        return {name: output for name, output in self.feature_maps(x) if name in layers}


def initialise(model: nn.Module, seed: int) -> None:
    """Random weights, drawn as He et al. (2015, eq. 10) do; one seed gives one set of weights.

    What each of L blocks adds to its input is scaled by 1/sqrt(L), or a thousand layers overflow.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
            if module.bias is not None:  # only gates have one
                nn.init.constant_(module.bias, GATE_BIAS)
    blocks = [each for each in model.modules() if isinstance(each, Block) and each.adds]
    for block in blocks:
        nn.init.constant_(block.last_norm.weight, len(blocks) ** -0.5)
