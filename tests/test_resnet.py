"""Our ResNets against torchvision's where it has them, against the paper's tables where not."""

import pytest
import torch
from later import Later
from reference import torchvision_model

from resfeat.backbones import build, numbers, ours, outline, shapes
from resfeat.backbones.architecture import cifar
from resfeat.backbones.ours import BACKBONES, LIKE_TORCHVISION, default_pixels
from resfeat.backbones.pooling import pool
from resfeat.backbones.resnet import Block, initialise
from resfeat.backbones.weights import resolve
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import FeatureSpec

models = Later("torchvision.models")
torchvision = Later("resfeat.backbones.torchvision")

CLASSIFIER_OF_CIFAR = 64 * 10 + 10


def crop_of(name):
    return 32 if name.startswith("cifar") else 224


def parameters(name):
    return numbers(name, crop_of(name)).parameter_count()


def gflops(name):
    return numbers(name, crop_of(name)).gflops(crop_of(name))


def layers_on_the_path(name):
    """Convolutions from the picture to the last map, and the classifier."""
    shortcuts = ("downsample", "gate")
    return 1 + sum(
        isinstance(module, torch.nn.Conv2d) and not any(word in key for word in shortcuts)
        for key, module in outline(name, crop_of(name)).named_modules()
    )


@pytest.mark.parametrize(
    "name",
    # A thousand layers take half a minute, a hundred some seconds.
    [
        pytest.param(
            name,
            marks=[pytest.mark.more] * any(n in name for n in ("1202", "110", "101", "152", "56_")),
        )
        for name in BACKBONES
    ],
)
def test_the_numbers_that_are_worked_out_are_those_of_the_network(name):
    """Measured by running it without values; torch counts the operations."""
    worked_out, network = BACKBONES[name], outline(name, 64)
    assert worked_out.parameter_count() == network.parameter_count()
    # The odd side shows how halves are rounded.
    for crop in (32, 61, 224) if name in ("resnet18", "resnet50", "cifar_resnet20") else (61,):
        assert worked_out.shapes(crop) == network.shapes(crop)
        assert list(worked_out.shapes(crop)) == list(network.taps)
        assert worked_out.gflops(crop) == network.gflops(crop)


@pytest.mark.parametrize("name", LIKE_TORCHVISION)
def test_the_weights_that_are_written_down_are_those_that_torchvision_publishes(name):
    written, published = ours.published(name), torchvision.published(name)
    assert [(each.name, each.preprocessing) for each in written.values()] == [
        (each.name, each.preprocessing) for each in published.values()
    ]


@pytest.mark.parametrize("name", LIKE_TORCHVISION)
def test_the_pixels_of_our_networks_are_torchvisions_default(name):
    assert ours.default_pixels(name) == torchvision.default_pixels(name)


def test_the_pixels_of_the_networks_for_cifar():
    """Mean and deviation of CIFAR-10's training set, as its own pixels have them."""
    pixels = default_pixels("cifar_resnet20")
    assert (pixels.resize, pixels.crop) == (32, 32)
    assert pixels.mean == (0.4914, 0.4822, 0.4465)
    assert pixels.std == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize(
    "name",
    [
        # Wider or deeper than others, of the same blocks.
        pytest.param(
            name, marks=[pytest.mark.more] * any(n in name for n in ("101", "152", "wide"))
        )
        for name in LIKE_TORCHVISION
    ],
)
def test_embeddings_equal_torchvision_without_its_classifier(name):
    theirs = torchvision_model(name, seed=3)
    tensors = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    theirs.fc = torch.nn.Identity()
    identity = resolve(FeatureSpec(model="resnet18", weights="random:0")).identity
    identity = type(identity)(**{**vars(identity), "model": name})
    ours = {key: tensor.shape for key, tensor in outline(name, 224).state_dict().items()}
    assert ours == {key: tensor.shape for key, tensor in tensors.items()}
    runtime = TorchRuntime(identity, tensors, "cpu")

    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    transforms = identity.preprocessing
    mean, std = torch.tensor(transforms.mean), torch.tensor(transforms.std)
    normalised = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        expected = theirs(normalised)

    embeddings = torch.from_numpy(runtime.embed(pixels.numpy()))
    assert embeddings.shape == expected.shape
    assert (embeddings - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", LIKE_TORCHVISION)
def test_parameters_and_flops_are_those_that_torchvision_publishes(name):
    meta = models.get_model_weights(name).DEFAULT.meta
    dim = shapes(name, 224)["avgpool"][0]
    assert parameters(name) + dim * 1000 + 1000 == meta["num_params"]
    assert gflops(name) + dim * 1000 / 1e9 == pytest.approx(meta["_ops"], abs=6e-4)


# The paper's table 1, in billions of multiply-adds. Its shortcuts there are of kind A; for the
# bottlenecks see the docstring of resnet.py.
@pytest.mark.parametrize(
    ("name", "paper"),
    [("resnet18_a", 1.8), ("resnet34_a", 3.6), ("plain18", 1.8), ("plain34", 3.6)],
)
def test_flops_of_table_1(name, paper):
    assert round(gflops(name), 1) == paper


# Table 6: millions of parameters, with the classifier.
@pytest.mark.parametrize(
    ("depth", "millions"),
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)],
)
def test_parameters_of_table_6(depth, millions):
    name = f"cifar_resnet{depth}"
    digits = len(str(millions).partition(".")[2])
    assert round((parameters(name) + CLASSIFIER_OF_CIFAR) / 1e6, digits) == millions
    assert layers_on_the_path(name) == depth
    assert shapes(name, 32) == {
        "stem": (16, 32, 32),
        "layer1": (16, 32, 32),
        "layer2": (32, 16, 16),
        "layer3": (64, 8, 8),
        "avgpool": (64, 8, 8),
    }


@pytest.mark.parametrize("name", [n for n in BACKBONES if "1202" not in n])
def test_a_name_tells_its_depth(name):
    depth = int(
        "".join(
            c
            for c in name.partition("_2")[0].partition("_32")[0].partition("_64")[0]
            if c.isdigit()
        )
    )
    assert layers_on_the_path(name) == depth


@pytest.mark.parametrize(
    ("plain", "residual"), [("plain34", "resnet34_a"), ("cifar_plain56", "cifar_resnet56")]
)
def test_a_plain_network_is_the_residual_one_without_its_shortcuts(plain, residual):
    """Option A adds no parameters, so the same weights fit both."""
    crop = 32
    ours, theirs = build(plain, crop), build(residual, crop)
    initialise(theirs, 0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, crop, crop)
    with torch.inference_mode():
        assert not torch.equal(ours(x, ["avgpool"])["avgpool"], theirs(x, ["avgpool"])["avgpool"])
        for module in theirs.modules():
            if isinstance(module, Block):
                module.kind = "none"
        assert torch.equal(ours(x, ["avgpool"])["avgpool"], theirs(x, ["avgpool"])["avgpool"])


def test_option_a_subsamples_and_pads_with_zeros():
    block = Block(cifar(20, "A").stages()[1][0]).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # so that nothing but the shortcut is left
    x = torch.rand(1, 16, 8, 8)
    with torch.inference_mode():
        given = block(x)
    assert torch.equal(given[:, :16], x[:, :, ::2, ::2])
    assert not given[:, 16:].any() and given.shape == (1, 32, 4, 4)


def test_option_c_projects_where_option_b_does_not():
    def projections(name):
        return sum("downsample.0" in key for key, _ in outline(name, 32).named_modules())

    assert projections("cifar_resnet20") == 2  # two paddings, which have no parameters
    assert projections("cifar_resnet20_b") == 2
    assert projections("cifar_resnet20_c") == 9
    assert parameters("cifar_resnet20") < parameters("cifar_resnet20_b")


def test_a_highway_gate_carries_or_transforms():
    """y = H(x) T(x) + x (1 - T(x)): equation 3 of the highway paper."""
    block = Block(cifar(20, "highway").stages()[0][0]).eval()
    x = torch.rand(2, 16, 8, 8)
    with torch.inference_mode():
        transformed = block.step(2, block.step(1, x))
        torch.nn.init.zeros_(block.gate.weight)
        for bias, expected in ((-1e4, x), (1e4, transformed), (0.0, (x + transformed) / 2)):
            torch.nn.init.constant_(block.gate.bias, bias)
            assert torch.allclose(block(x), expected, atol=1e-6)
    # Where shapes change the paper uses plain layers.
    assert not hasattr(Block(cifar(20, "highway").stages()[1][0]), "gate")
    assert sum("gate.weight" in key for key in outline("cifar_highway20", 32).state_dict()) == 7


def test_a_thousand_random_layers_do_not_overflow():
    model = build("cifar_resnet1202", 8)
    initialise(model, 0)
    with torch.inference_mode():
        deep = model(torch.randn(2, 3, 8, 8), ["avgpool"])["avgpool"]
    assert torch.isfinite(deep).all() and deep.std() > 1e-3
    assert deep.abs().max() < 1e4


def test_every_stage_is_reachable_by_name():
    theirs = torchvision_model("resnet18", seed=0)
    ours = build("resnet18", 224)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        given = ours(x, ours.taps)
        assert list(given) == ["stem", "layer1", "layer2", "layer3", "layer4", "avgpool"]
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        assert torch.equal(given["stem"], expected)
        for number in range(1, 5):
            expected = getattr(theirs, f"layer{number}")(expected)
            assert torch.equal(given[f"layer{number}"], expected)
        assert torch.equal(pool(given["avgpool"], "avg"), theirs.avgpool(expected).flatten(1))
        several = ours(x, ["layer2", "avgpool"])
    assert {name: tuple(output.shape) for name, output in several.items()} == {
        "layer2": (1, 128, 28, 28),
        "avgpool": (1, 512, 7, 7),
    }


def test_pooling():
    x = torch.rand(2, 3, 4, 5)
    assert torch.equal(pool(x, "avg"), x.mean((2, 3)))
    assert torch.equal(pool(x, "max"), x.flatten(2).max(2).values)
    gem = (x**3).mean((2, 3)) ** (1 / 3)
    assert torch.allclose(pool(x, "gem"), gem)
    assert (pool(x, "gem") > pool(x, "avg")).all() and (pool(x, "gem") < pool(x, "max")).all()
    assert torch.equal(pool(x[:, :, 0, 0], "avg"), x[:, :, 0, 0])
    assert torch.isfinite(pool(torch.zeros(1, 2, 3, 3), "gem")).all()


def test_random_weights_depend_on_the_seed_alone():
    def weights(seed, model="resnet18"):
        return resolve(FeatureSpec(model=model, weights=f"random:{seed}")).identity.weights_digest

    for model in ("resnet18", "torchvision:squeezenet1_1"):
        torch.manual_seed(99)
        first = weights(7, model)
        state = torch.get_rng_state()
        torch.rand(5)
        assert first == weights(7, model)
        assert first != weights(8, model)
        torch.manual_seed(99)
        weights(7, model)
        assert torch.equal(torch.get_rng_state(), state)  # the caller's own randomness is untouched
