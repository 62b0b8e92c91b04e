"""Our own networks in OpenVINO's operations, without the seconds that it takes to trace a torch
module and have OpenVINO convert it. What comes out is the same, to the last bit.

To be imported by `openvino.py` alone, which sees to it that OpenVINO reports its use to nobody.
"""

from typing import Any, TypeAlias

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as ops
from torch import nn

from resfeat.backbones.pooling import GEM_FLOOR, GEM_POWER
from resfeat.backbones.resnet import Block, ResNet
from resfeat.runtimes.embedder import Embedder

Node: TypeAlias = Any  # an output of one of OpenVINO's nodes, which are untyped
_HEIGHT_AND_WIDTH = np.array([2, 3])
_LEAST_LENGTH = 1e-12  # of a vector that is normalised; torch's default


def graph_of(embedder: Embedder) -> openvino.Model:
    """`embedder`, whose network is a ResNet, as a model of any batch size."""
    pixels = ops.parameter([-1, -1, -1, -1], np.uint8)
    pictures = ops.transpose(ops.convert(pixels, "f32"), np.array([0, 3, 1, 2]))
    centred = ops.add(ops.divide(pictures, _number(255.0)), -embedder.mean.numpy())
    x = ops.divide(centred, embedder.std.numpy())
    network, layers = embedder.network, embedder.identity.layers
    assert isinstance(network, ResNet)
    x = _module(_module(_convolved(x, network.conv1), network.relu), network.maxpool)
    maps = {"stem": x}
    for name in network.stages:
        for block in getattr(network, name):
            x = _block(x, block)
        maps[name] = x
    maps["avgpool"] = x
    vectors = [_pooled(maps[name], embedder.identity.pool) for name in layers]
    if embedder.identity.normalize:
        vectors = [_normalised(vector) for vector in vectors]
    return openvino.Model([ops.concat(vectors, 1) if len(vectors) > 1 else vectors[0]], [pixels])


def _block(x: Node, block: Block) -> Node:
    inner = x
    for number in range(1, block.depth + 1):
        inner = _convolved(inner, getattr(block, f"conv{number}"))
        inner = inner if number == block.depth else ops.relu(inner)
    if block.kind == "none":
        return ops.relu(inner)
    if block.kind == "highway":
        gate = ops.sigmoid(_convolved(x, block.gate))
        carried = ops.multiply(x, ops.subtract(_number(1.0), gate))
        return ops.add(ops.multiply(ops.relu(inner), gate), carried)
    for module in block.downsample:
        x = _module(x, module)
    return ops.relu(ops.add(inner, x))


def _module(x: Node, module: nn.Module) -> Node:
    if isinstance(module, nn.Conv2d):
        return _convolved(x, module)
    if isinstance(module, nn.ReLU):
        return ops.relu(x)
    if isinstance(module, nn.MaxPool2d):
        stride, pads, kernel = _twice(module.stride), _twice(module.padding), module.kernel_size
        return ops.max_pool(x, stride, [1, 1], pads, pads, _twice(kernel)).output(0)
    if isinstance(module, nn.ZeroPad3d):
        behind = np.array([0, module.padding[-1], 0, 0])
        return ops.pad(x, np.zeros(4, np.int64), behind, "constant", np.float32(0))
    assert isinstance(module, nn.Identity)  # a batch norm that was folded, or no pooling
    return x


def _convolved(x: Node, conv: nn.Conv2d) -> Node:
    weights, pads = conv.weight.numpy(), _twice(conv.padding)
    apply = ops.convolution
    if conv.groups > 1:
        weights = weights.reshape(conv.groups, -1, *weights.shape[1:])
        apply = ops.group_convolution
    x = apply(x, _constant(weights), _twice(conv.stride), pads, pads, [1, 1])
    return x if conv.bias is None else ops.add(x, conv.bias.numpy().reshape(1, -1, 1, 1))


def _pooled(features: Node, how: str) -> Node:
    if how == "max":
        return ops.reduce_max(features, _HEIGHT_AND_WIDTH)
    if how == "gem":
        powers = ops.power(ops.maximum(features, _number(GEM_FLOOR)), _number(GEM_POWER))
        return ops.power(ops.reduce_mean(powers, _HEIGHT_AND_WIDTH), _number(1 / GEM_POWER))
    return ops.reduce_mean(features, _HEIGHT_AND_WIDTH)


def _normalised(vector: Node) -> Node:
    length = ops.reduce_l2(vector, np.array([1]), keep_dims=True)
    return ops.divide(vector, ops.maximum(length, _number(_LEAST_LENGTH)))


def _constant(array: NDArray[Any]) -> Node:
    return openvino.op.Constant(array, shared_memory=True).output(0)


def _number(value: float) -> np.float32:
    return np.float32(value)


def _twice(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value, value]
