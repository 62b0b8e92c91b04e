"""Other libraries' networks: headless, with the preprocessing of their own weights."""

import os
import re
import subprocess
import sys
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from later import Later
from PIL import Image
from torch import nn

from resfeat.backbones import find, outline, shapes
from resfeat.backbones.ours import IMAGENET
from resfeat.backbones.weights import resolve
from resfeat.cli import models
from resfeat.decoding.decode import decode
from resfeat.errors import ResfeatError, UsageError
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import FeatureSpec

timm = Later("timm")
zoo = Later("torchvision.models")
of_torchvision = Later("resfeat.backbones.torchvision")


def pixels_and_input(identity, count=2):
    """Random pixels uint8 NHWC, and the same as a network is given them."""
    pixels = identity.preprocessing
    shape = (count, pixels.crop, pixels.crop, 3)
    batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    normalised = (batch / np.float32(255) - np.float32(pixels.mean)) / np.float32(pixels.std)
    return batch, torch.from_numpy(normalised).permute(0, 3, 1, 2)


def close(given, expected):
    return np.abs(given - expected.numpy()).max() <= 1e-4 * expected.abs().max()


LARGE = ("alexnet", "vgg11_bn", "vit_b_32", "convnext_tiny", "densenet121", "googlenet", "swin_t")
# The classifier of each, and how torchvision builds it for its published weights.
CLASSIFIERS = {
    "alexnet": ("classifier.6", {}),
    "vgg11_bn": ("classifier.6", {}),
    "googlenet": ("fc", {"transform_input": True, "aux_logits": False, "init_weights": False}),
    "densenet121": ("classifier", {}),
    "convnext_tiny": ("classifier.2", {}),
    "vit_b_32": ("heads.head", {}),
    "swin_t": ("head", {}),
    "regnet_y_400mf": ("fc", {}),
    "mobilenet_v3_small": ("classifier.3", {}),
    "squeezenet1_1": ("classifier.1", {}),
    "mnasnet0_5": ("classifier.1", {}),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.more] * (name in LARGE)) for name in CLASSIFIERS],
)
def test_torchvisions_network_gives_what_its_classifier_is_given(name):
    weights = resolve(FeatureSpec(model=f"torchvision:{name}", weights="random:0"))
    assert weights.identity.layers == ("pre_logits",) and weights.identity.pool == "own"
    classifier, options = CLASSIFIERS[name]
    theirs = zoo.get_model(name, **options).eval()
    tensors = OrderedDict(weights.tensors)
    tensors._metadata = theirs.state_dict()._metadata  # some look up their version there
    kept = theirs.load_state_dict(tensors, strict=False)
    assert all(
        key.startswith(f"{classifier}.") or "num_batches" in key for key in kept.missing_keys
    )
    assert not kept.unexpected_keys
    seen = []
    theirs.get_submodule(classifier).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].clone())
    )
    batch, x = pixels_and_input(weights.identity)
    if "transform_input" in options:  # it undoes this, and normalises by halves
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET.mean, IMAGENET.std))
        x = (x * 0.5 + 0.5 - mean) / std
    with torch.inference_mode():
        theirs(x)
    expected = seen[0] if seen[0].dim() == 2 else seen[0].mean((2, 3))
    given = TorchRuntime(weights.identity, weights.tensors, "cpu").embed(batch)
    assert given.shape == (2, weights.dims["pre_logits"])
    assert close(given, expected)


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.more)])
def test_every_classification_network_of_torchvision_has_an_outline(step):
    assert len(of_torchvision.names()) >= 80
    for name in of_torchvision.names()[::step]:
        crop = of_torchvision.default_pixels(name).crop
        ((tap, shape),) = shapes(f"torchvision:{name}", crop).items()
        assert tap == "pre_logits" and len(shape) == 1
        meta = zoo.get_model_weights(name).DEFAULT.meta
        parameters = sum(p.numel() for p in outline(f"torchvision:{name}", crop).parameters())
        # Less a classifier of 1,000 classes, with biases or not, and two networks' training heads.
        if name not in ("googlenet", "inception_v3"):
            assert meta["num_params"] - parameters - shape[0] * 1000 in (0, 1000), name


def test_published_weights_load_with_the_preprocessing_that_belongs_to_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = zoo.SqueezeNet1_1_Weights.DEFAULT
    cached = tmp_path / "hub" / "checkpoints" / os.path.basename(entry.url)
    cached.parent.mkdir(parents=True)
    torch.manual_seed(0)
    theirs = zoo.squeezenet1_1().eval()
    torch.save(theirs.state_dict(), cached)
    weights = resolve(FeatureSpec(model="torchvision:squeezenet1_1"))
    assert weights.origin == entry.name
    batch, x = pixels_and_input(weights.identity)
    with torch.inference_mode():
        expected = theirs.features(x).mean((2, 3))
    assert close(TorchRuntime(weights.identity, weights.tensors, "cpu").embed(batch), expected)


@pytest.mark.parametrize(
    ("name", "today", "before"),
    [
        pytest.param(
            "densenet121",
            r"(denselayer\d+\.(?:norm|conv))([12])\.",
            r"\1.\2.",
            marks=pytest.mark.more,
        ),
        ("vit_b_32", r"\.mlp\.(0|3)\.", lambda m: f".mlp.linear_{1 if m[1] == '0' else 2}."),
    ],
)
def test_files_of_older_versions_load(name, today, before, tmp_path):
    """Published ones among them: torchvision renames their tensors while it loads them."""
    theirs = zoo.get_model(name)
    older = {re.sub(today, before, key): tensor for key, tensor in theirs.state_dict().items()}
    assert set(older) != set(theirs.state_dict())
    torch.save(older, tmp_path / "older.pth")
    weights = resolve(FeatureSpec(model=f"torchvision:{name}", weights=str(tmp_path / "older.pth")))
    assert all(torch.equal(theirs.state_dict()[key], t) for key, t in weights.tensors.items())


def hub_cache(folder, name, tensors):
    """A file of weights as the Hugging Face cache holds it."""
    import safetensors.torch

    repository = folder / f"models--timm--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(tensors, snapshot / "model.safetensors")


@pytest.mark.parametrize("model", ["timm:resnet10t", "timm:resnet10t.c3_in1k"])
def test_timms_published_weights_come_from_the_hubs_cache(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t").eval()
    hub_cache(tmp_path, "resnet10t.c3_in1k", theirs.state_dict())
    weights = resolve(FeatureSpec(model=model))
    assert weights.origin == "c3_in1k"
    batch, x = pixels_and_input(weights.identity)
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    assert close(TorchRuntime(weights.identity, weights.tensors, "cpu").embed(batch), expected)


def test_timms_weights_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResfeatError, match=r"timm/resnet10t\.c3_in1k .*--weights PATH"):
        resolve(FeatureSpec(model="timm:resnet10t"))


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_tiny", "efficientnet_b0", "vit_base_patch16_224"]
)
def test_pixels_are_those_of_timms_own_transform(name, photos):
    family, rest = find(f"timm:{name}")
    pixels = family.default_pixels(rest)
    config = timm.data.resolve_data_config(pretrained_cfg=vars(timm.get_pretrained_cfg(name)))
    transform = timm.data.create_transform(**config)
    mean, std = (np.float32(each).reshape(3, 1, 1) for each in (config["mean"], config["std"]))
    for path in sorted(photos.rglob("*.png"))[::25]:
        with Image.open(path) as image:
            expected = transform(image.convert("RGB")).numpy() * std + mean
        given = decode(path.read_bytes(), pixels, "pillow").pixels.transpose(2, 0, 1) / 255
        assert np.abs(given - expected).max() < 1e-3


def test_a_network_whose_pictures_are_made_otherwise_is_refused():
    squashed = next(
        name
        for name in timm.list_pretrained()
        if timm.get_pretrained_cfg(name).crop_mode == "squash"
    )
    with pytest.raises(UsageError, match="only crops the centre"):
        resolve(FeatureSpec(model=f"timm:{squashed}", weights="random:0"))


def test_weights_of_which_only_some_are_for_squashed_pictures_leave_the_others():
    mixed = next(
        name
        for name in timm.list_models(pretrained=False)
        if (default := timm.get_pretrained_cfg(name)) and default.tag
        if default.crop_mode == "center" and default.input_size[1] == default.input_size[2]
        if any(
            timm.get_pretrained_cfg(tagged).crop_mode == "squash"
            for tagged in timm.list_pretrained(f"{name}.*")
        )
    )
    family, name = find(f"timm:{mixed}")
    tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{name}.*")]
    assert 1 <= len(family.published(name)) < len(tags)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("resnet51", "did you mean resnet50"),
        ("torchvision:resnet51", "did you mean torchvision:resnet50"),
        ("timm:resnet18.nothing", "resnet18"),
        ("keras:resnet50", "only torchvision: and timm:"),
        ("timm:", "see `resfeat models`"),
        ("", "see `resfeat models`"),
    ],
)
def test_models_that_are_not_there(model, told):
    with pytest.raises(UsageError, match=told):
        resolve(FeatureSpec(model=model, weights="random:0"))


def test_a_vision_transformer_takes_the_size_of_its_weights():
    large = FeatureSpec(model="torchvision:vit_b_32", weights="random:0", resize=256, crop=256)
    assert resolve(large).tensors["encoder.pos_embedding"].shape[1] == (256 // 32) ** 2 + 1
    with pytest.raises(UsageError, match="does not take pictures of 250 x 250"):
        resolve(FeatureSpec(model="torchvision:vit_b_32", weights="random:0", resize=250, crop=250))


def test_a_network_that_no_classifier_was_taken_off_has_no_linear_layer_left():
    headless = outline("torchvision:alexnet", 224).network
    assert isinstance(headless.classifier[6], nn.Identity)


@pytest.mark.parametrize("model", ["resnet51", "", "keras:resnet50", "vgg"])
def test_a_misspelt_name_is_told_before_anything_heavy_is_imported(model):
    program = (
        "import sys; from resfeat.backbones import check_name\n"
        "for each in ('resnet50', 'torchvision:any', 'timm:any'): check_name(each)\n"
        f"try: check_name({model!r})\n"
        "except Exception as error: print(error)\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'ray', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    told, imported = done.stdout.splitlines()
    with pytest.raises(UsageError) as raised:
        find(model)
    assert (told, imported) == (str(raised.value), "[]")


def test_a_model_that_takes_a_while_is_announced(resfeat, monkeypatch):
    """timm takes seconds to import."""
    row = models._row
    monkeypatch.setattr(models, "_row", lambda name: time.sleep(0.8) or row(name))
    for more in [], ["--json"]:
        done = resfeat("models", "resnet18", *more)
        assert done.stderr == "looking up resnet18 ...\n" and "resnet18" in done.stdout
    monkeypatch.undo()
    assert resfeat("models", "resnet18").stderr == ""


@pytest.mark.parametrize("arguments", [[], ["resnet50"], ["cifar*", "--json"]])
def test_our_models_are_listed_without_importing_anything_heavy(arguments):
    """That is what makes it a matter of tenths of a second."""
    program = (
        f"import sys; from resfeat.cli import main\ntry: main(['models', *{arguments!r}])\n"
        "finally: print(sorted({'torch', 'torchvision', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
