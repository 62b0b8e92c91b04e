"""Headless ResNets: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016.

The networks of table 1 and section 4.2 (CIFAR-10), the plain ones that the paper compares them
with, and three relatives: wide ResNets (Zagoruyko & Komodakis, 2016), ResNeXt (Xie et al., 2017)
and "highway" shortcuts (Srivastava, Greff, Schmidhuber, "Training Very Deep Networks", 2015).

As in torchvision, a bottleneck strides on its 3x3 convolution, not on the first 1x1 as in the
paper. Parameter names are torchvision's, so its checkpoints load strictly once `fc` is left out.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from resfeat.backbones.architecture import Architecture, BlockNumbers, Convolution
from resfeat.backbones.backbone import Backbone

# Opens the way for the input when training begins: the transform gate starts at sigmoid(-1) = 0.27.
GATE_BIAS = -1.0


class Steps(nn.Module):
    """Convolutions conv1, conv2, ..., each with its batch norm bn1, bn2, ..."""

    relu: nn.ReLU

    def step(self, number: int, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """One convolution, its batch norm, what a shortcut adds, and the ReLU."""
        y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))
        return self.relu(y if shortcut is None else y + shortcut)  # type: ignore[no-any-return]


class Block(Steps):
    """Convolutions and the shortcut around them."""

    def __init__(self, numbers: BlockNumbers) -> None:
        super().__init__()
        self.kind = numbers.shortcut
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if self.kind == "highway" and numbers.beside:
            self.gate = conv(numbers.beside)
        elif numbers.beside:
            projection, outputs = conv(numbers.beside), numbers.beside.outputs
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))
        elif self.kind == "A" and numbers.inputs != numbers.outputs:
            # Every `stride`-th pixel, and channels of zeros for those that the input lacks.
            zeros = nn.ZeroPad3d((0, 0, 0, 0, 0, numbers.outputs - numbers.inputs))
            self.downsample = nn.Sequential(nn.MaxPool2d(1, numbers.stride), zeros)
        self.depth = len(numbers.convolutions)
        for number, convolution in enumerate(numbers.convolutions, start=1):
            setattr(self, f"conv{number}", conv(convolution))
            setattr(self, f"bn{number}", nn.BatchNorm2d(convolution.outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth):
            y = self.step(number, y)
        if self.kind == "none":
            return self.step(self.depth, y)
        if self.kind == "highway":
            transform = torch.sigmoid(self.gate(x))
            return self.step(self.depth, y) * transform + x * (1 - transform)
        return self.step(self.depth, y, self.downsample(x))


def conv(numbers: Convolution) -> nn.Conv2d:
    """A convolution that keeps height and width at a stride of 1."""
    inputs, outputs, kernel, stride, groups, bias = numbers
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


class ResNet(Steps, Backbone):
    """A ResNet up to its last feature map.

    Taps: "stem" is what the first stage sees, "layer1" and so on are the stages. "avgpool" is the
    last stage again, named for the pooling that makes it the embedding.
    """

    head = ("fc",)  # what torchvision puts on top, to be left out of a checkpoint

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.conv1 = conv(architecture.first)
        self.bn1 = nn.BatchNorm2d(architecture.first.outputs)
        self.relu = nn.ReLU(inplace=True)
        pooled = architecture.stem == "imagenet"
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pooled else nn.Identity()
        self.stages: list[str] = []
        for number, blocks in enumerate(architecture.stages(), start=1):
            self.stages.append(f"layer{number}")
            setattr(self, self.stages[-1], nn.Sequential(*map(Block, blocks)))
        self.taps = ("stem", *self.stages, "avgpool")

    def feature_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Run the network on `x`, float [N, 3, H, W], and give each tap's map [N, C, h, w]."""
        x = self.maxpool(self.step(1, x))
        yield "stem", x
        for name in self.stages:
            x = getattr(self, name)(x)
            yield name, x
        yield "avgpool", x

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        return {name: output for name, output in self.feature_maps(x) if name in layers}


def initialise(model: nn.Module, seed: int) -> None:
    """Random weights, drawn as He et al. (2015, eq. 10) do; one seed gives one set of weights. What
    each of L blocks adds to its input is scaled by 1/sqrt(L), or a thousand layers overflow."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
            if module.bias is not None:  # only gates have one
                nn.init.constant_(module.bias, GATE_BIAS)
    blocks = [m for m in model.modules() if isinstance(m, Block) and m.kind in ("A", "B", "C")]
    for block in blocks:
        nn.init.constant_(getattr(block, f"bn{block.depth}").weight, len(blocks) ** -0.5)
