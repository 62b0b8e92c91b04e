"""Our networks in OpenVINO's operations: the bits that OpenVINO gives for the traced ones."""

import numpy as np
import pytest
import torch

from resfeat.backbones.weights import resolve
from resfeat.runtimes import openvino as module
from resfeat.spec import FeatureSpec


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("cifar_resnet20", {}),
        ("cifar_resnet20_b", {"pool": "gem", "normalize": True, "layers": ("layer1", "avgpool")}),
        ("cifar_resnet20_c", {"pool": "max", "layers": ("stem", "avgpool")}),
        ("cifar_plain20", {"pool": "gem"}),
        ("cifar_highway20", {"normalize": True}),
        ("resnet18", {}),
        pytest.param("resnext50_32x4d", {}, marks=pytest.mark.more),
    ],
)
def test_what_is_built_gives_the_bits_of_what_is_traced(model, options, monkeypatch):
    weights = resolve(FeatureSpec(model=model, weights="random:0", **options))
    chance = torch.Generator().manual_seed(1)
    tensors = {  # a new network's are all 0
        name: 0.1 * torch.rand(tensor.shape, generator=chance)
        if name.endswith(("bias", "running_mean"))
        else tensor
        for name, tensor in weights.tensors.items()
    }
    crop = weights.identity.preprocessing.crop
    pixels = np.random.default_rng(0).integers(0, 256, (2, crop, crop, 3), np.uint8)

    def embedded():
        network = module.convert(weights.identity, tensors)
        return module.OpenVINORuntime(weights.identity, network, 1, 2).embed(pixels).copy()

    built = embedded()
    monkeypatch.setattr(module, "graph_of", module._traced)
    assert np.array_equal(built, embedded())
    assert np.isfinite(built).all() and (built[0] != built[1]).any()
