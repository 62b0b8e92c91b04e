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

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from resfeat.backbones.architecture import Architecture, Shortcut
from resfeat.backbones.backbone import Backbone

# Opens the way for the input when training begins: the transform gate starts at sigmoid(-1) = 0.27.
GATE_BIAS = -1.0


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

    def __init__(self, inputs: int, width: int, stride: int, architecture: Architecture) -> None:
        outputs = width * architecture.expansion
        super().__init__(inputs, outputs, stride, architecture.shortcut)
        groups = architecture.groups
        inner = architecture.inner(width)
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
                inputs = width * architecture.expansion
            self.stages.append(f"layer{number}")
            setattr(self, self.stages[-1], nn.Sequential(*blocks))
        self.taps = ("stem", *self.stages, "avgpool")

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
