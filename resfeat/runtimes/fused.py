"""Our networks with a convolution's bias, shortcut and ReLU in the kernel of the convolution.

One after the other they read and write every feature map three times more, and memory is what
limits a ResNet on a GPU: ResNet-50 in bf16 is twice as fast this way on an H100 (see
tests/benchmarks/GPU.md). In bf16 and fp16 fewer values are rounded, so the bits are others.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from resfeat.backbones.resnet import Block, ResNet, Steps
from resfeat.runtimes.embedder import Embedder


def fuse(embedder: Embedder) -> Embedder | None:
    """The same, fused; its weights are shared. None if the network is another library's."""
    if not isinstance(embedder.network, ResNet):
        return None
    embedder = copy.deepcopy(embedder, {id(each): each for each in embedder.parameters()})
    for module in embedder.network.modules():
        if isinstance(module, Block):
            _join_biases(module)
        if isinstance(module, Steps):
            module.step = partial(_step, module)  # type: ignore[method-assign]
    return embedder


def _step(steps: Steps, number: int, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """As `Steps.step`, where batch norms are folded."""
    conv = getattr(steps, f"conv{number}")
    shape = conv.stride, conv.padding, conv.dilation, conv.groups
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *shape)
    return torch.cudnn_convolution_add_relu(x, conv.weight, shortcut, 1.0, conv.bias, *shape)


@torch.no_grad()
def _join_biases(block: Block) -> None:
    """Add the bias of the shortcut's projection to that of the last convolution: both are added to
    the same sum."""
    last = getattr(block, f"conv{block.depth}")
    for projection in block.downsample:
        if isinstance(projection, nn.Conv2d):
            last.bias = nn.Parameter(last.bias + projection.bias, requires_grad=False)
            projection.bias = None
