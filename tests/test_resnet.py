"""The backbones against torchvision's networks and the paper's table 1."""

import pytest
import torch
from reference import torchvision_model

from resfeat.backbones import BACKBONES, build
from resfeat.backbones.resnet import initialise
from resfeat.backbones.weights import resolve
from resfeat.runtimes.torch import TorchRuntime

# Weighted layers on the longest path (the name), and torchvision's parameters less the classifier.
PARAMETERS = {
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
    "resnet152": 58_143_808,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_embeddings_equal_torchvision_without_its_classifier(name, tmp_path):
    theirs = torchvision_model(name, seed=3)
    torch.save(theirs.state_dict(), tmp_path / "checkpoint.pth")
    theirs.fc = torch.nn.Identity()
    weights = resolve(name, str(tmp_path / "checkpoint.pth"))
    runtime = TorchRuntime(weights.identity, weights.tensors, "cpu")

    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    transforms = weights.identity.preprocessing
    mean, std = torch.tensor(transforms.mean), torch.tensor(transforms.std)
    normalised = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        expected = theirs(normalised)

    embeddings = torch.from_numpy(runtime.embed(pixels.numpy()))
    assert embeddings.shape == (2, runtime.dim)
    assert (embeddings - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", BACKBONES)
def test_parameters_and_depth(name):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    on_the_path = [
        key
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and "downsample" not in key
    ]
    assert len(on_the_path) + 1 == int(name.removeprefix("resnet"))  # and the classifier


def test_every_stage_is_reachable_by_name():
    theirs = torchvision_model("resnet18", seed=0)
    ours = build("resnet18")
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        stages = dict(ours.stages(x))
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        assert torch.equal(stages["stem"], expected)
        for number in range(1, 5):
            expected = getattr(theirs, f"layer{number}")(expected)
            assert torch.equal(stages[f"layer{number}"], expected)
        several = ours(x, layers=("layer2", "avgpool"))
    assert {name: tuple(output.shape) for name, output in several.items()} == {
        "layer2": (1, 128, 28, 28),
        "avgpool": (1, 512),
    }


def test_random_weights_depend_on_the_seed_alone():
    def weights(seed):
        model = build("resnet18")
        initialise(model, seed)
        return model.state_dict()["layer4.1.conv2.weight"]

    torch.manual_seed(99)
    first = weights(7)
    torch.rand(5)
    assert torch.equal(first, weights(7))
    assert not torch.equal(first, weights(8))
