"""Headless ResNets: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016.

The ImageNet networks of the paper's table 1, without the classifier. This is the variant that
torchvision publishes weights for: a bottleneck strides on its 3x3 convolution, not on the first 1x1
as the paper's own networks do. Parameter names are torchvision's, so its checkpoints load strictly
once `fc` is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

STAGE_WIDTHS = (64, 128, 256, 512)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width (at stride 1); batch norm supplies the bias."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Figure 5, left: two 3x3 convolutions around which the input is carried unchanged."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        activated: Tensor = self.relu(residual + self.downsample(x))
        return activated


class Bottleneck(nn.Module):
    """Figure 5, right: 1x1 reduces, 3x3 works (and strides), 1x1 restores four times the width."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        activated: Tensor = self.relu(residual + self.downsample(x))
        return activated


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The identity, or where shapes differ the paper's option B: a 1x1 projection (eq. 2)."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


Block = type[BasicBlock] | type[Bottleneck]

# Table 1: the block, and how many of them each of the four stages stacks.
DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A ResNet up to and including global average pooling.

    `dim` is the length of its embedding: 512 for basic blocks, 2,048 for bottlenecks.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        block, counts = DEPTHS[depth]
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        inputs = 64
        for number, (width, count) in enumerate(zip(STAGE_WIDTHS, counts, strict=True), start=1):
            blocks = []
            for position in range(count):
                # Each stage after the first halves height and width, in its first block.
                stride = 2 if number > 1 and position == 0 else 1
                blocks.append(block(inputs, width, stride))
                inputs = width * block.expansion
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.dim = inputs

    def stages(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Run the network and give each stage's name and output, in order.

        `x` is float [N, 3, H, W]. "stem" and "layer1" to "layer4" are [N, C, h, w], at strides 4,
        4, 8, 16 and 32; "avgpool" is [N, dim].
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        yield "stem", x
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            yield f"layer{number}", x
        yield "avgpool", x.mean(dim=(2, 3))

    def forward(self, x: Tensor, layers: Collection[str] = ("avgpool",)) -> dict[str, Tensor]:
        """The outputs of the named `layers`, in one pass."""
        return {name: output for name, output in self.stages(x) if name in layers}


def initialise(model: nn.Module, seed: int) -> None:
    """Random weights, drawn as He et al. (2015, eq. 10) do; one seed gives one set of weights."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
