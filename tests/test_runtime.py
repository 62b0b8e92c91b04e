"""The torch runtime: the same bits in every setting that may change between runs."""

import numpy as np
import pytest
import torch

from resfeat.backbones import build
from resfeat.backbones.weights import resolve
from resfeat.runtimes.torch import TorchRuntime, fold_batch_norm
from resfeat.spec import FeatureSpec


@pytest.fixture(scope="module")
def runtime():
    weights = resolve(FeatureSpec(model="resnet18", weights="random:0"))
    return TorchRuntime(weights.identity, weights.tensors, "cpu")


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)


def test_neighbours_in_the_batch_do_not_matter(runtime, pixels):
    alone = np.zeros_like(pixels)
    alone[3] = pixels[3]
    assert np.array_equal(runtime.embed(pixels)[3], runtime.embed(alone)[3])


def test_folding_leaves_no_batch_norm_and_the_same_embeddings():
    model = build("resnet50", 64)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model(x, ["avgpool"])["avgpool"]
        folded = fold_batch_norm(model)
        after = folded(x, ["avgpool"])["avgpool"]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(runtime, pixels):
    weights = resolve(FeatureSpec(model="resnet18", weights="random:0"))
    cuda = TorchRuntime(weights.identity, weights.tensors, "cuda")
    expected, given = runtime.embed(pixels), cuda.embed(pixels)
    cosines = (expected * given).sum(1) / np.linalg.norm(expected, axis=1)
    cosines /= np.linalg.norm(given, axis=1)
    assert cosines.min() > 0.9999
    assert np.array_equal(given, cuda.embed(pixels))
