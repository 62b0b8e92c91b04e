"""Weights: found, checked and identified, or refused in one line with nothing executed."""

import os
import pickle
import socket
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from reference import torchvision_model
from torchvision.models import ResNet50_Weights

from resfeat.backbones.weights import resolve
from resfeat.errors import ResfeatError, UsageError
from resfeat.spec import FeatureSpec


def load(model, weights, **choices):
    return resolve(FeatureSpec(model=model, weights=weights, **choices))


def test_one_set_of_weights_has_one_digest_in_any_file(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    safetensors.torch.save_file(tensors, tmp_path / "same.safetensors")
    headless = {name: t for name, t in tensors.items() if not name.startswith("fc.")}
    torch.save(headless, tmp_path / "headless.pt")
    paths = (checkpoint, tmp_path / "same.safetensors", tmp_path / "headless.pt")
    assert len({load("resnet18", str(path)).identity.fingerprint for path in paths}) == 1
    assert load("resnet18", "random:0").identity.weights_digest not in {
        load("resnet18", str(checkpoint)).identity.weights_digest
    }


@pytest.mark.parametrize(("name", "resize"), [("IMAGENET1K_V1", 256), ("DEFAULT", 232)])
def test_published_weights_come_from_hubs_cache_with_their_preprocessing(
    name, resize, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = ResNet50_Weights[name]
    cached = tmp_path / "hub" / "checkpoints" / os.path.basename(entry.url)
    cached.parent.mkdir(parents=True)
    torch.save(torchvision_model("resnet50", seed=resize).state_dict(), cached)
    weights = load("resnet50", name)
    assert weights.origin == entry.name
    transforms = entry.transforms()
    preprocessing = weights.identity.preprocessing
    assert preprocessing.resize == resize == transforms.resize_size[0]
    assert preprocessing.crop == transforms.crop_size[0]
    assert list(preprocessing.mean) == transforms.mean
    assert list(preprocessing.std) == transforms.std


def test_unreachable_weights_name_the_url_the_cache_path_and_the_option(tmp_path, monkeypatch):
    def no_network(*_args, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    started = time.monotonic()
    with pytest.raises(ResfeatError) as raised:
        load("resnet50", "DEFAULT")
    assert time.monotonic() - started < 5
    url = ResNet50_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / os.path.basename(url)
    for part in (url, str(cached), "--weights PATH"):
        assert part in str(raised.value)
    assert raised.value.exit_code == 1
    assert not list(cached.parent.iterdir())


def test_a_silent_network_is_given_up(tmp_path, monkeypatch):
    """A server that accepts and never answers: the call ends by its own timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr("resfeat.backbones.torchvision.CONNECT_SECONDS", 0.5)
        here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: here)
        started = time.monotonic()
        with pytest.raises(ResfeatError, match="timed out"):
            load("resnet18", "DEFAULT")
        assert time.monotonic() - started < 10


def test_older_checkpoints_have_no_batch_counts_and_the_same_digest(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    older = {name: t for name, t in tensors.items() if "num_batches_tracked" not in name}
    assert len(older) < len(tensors)
    torch.save(older, tmp_path / "older.pth")
    given = load("resnet18", str(tmp_path / "older.pth"))
    assert given.identity == load("resnet18", str(checkpoint)).identity


def test_half_precision_and_parameters_load_as_float32(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    halves = {name: torch.nn.Parameter(t.bfloat16()) if t.is_floating_point() else t
              for name, t in tensors.items()}  # fmt: skip
    torch.save(halves, tmp_path / "halves.pth")
    for tensor in load("resnet18", str(tmp_path / "halves.pth")).tensors.values():
        assert tensor.dtype == torch.float32 and not tensor.requires_grad


class Canary:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "evil.safetensors"])
def test_code_in_a_checkpoint_is_never_run(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    with pytest.raises(ResfeatError, match="never run"):
        load("resnet18", str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_named(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    missing = {name: t for name, t in tensors.items() if name != "layer1.0.bn1.weight"}
    misshapen = {**tensors, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    unknown = {**tensors, "layer1.5.extra.weight": torch.zeros(1)}
    broken = {**tensors, "bn1.bias": torch.full((64,), float("nan"))}
    for content, told in (
        (missing, "layer1.0.bn1.weight is missing"),
        (misshapen, r"conv1.weight is \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)"),
        (unknown, "layer1.5.extra.weight is unknown"),
        (broken, "bn1.bias has values that are not finite"),
        ({"weights of mine": tensors}, "no state dict that can be recognised"),
        ({1: torch.zeros(1)}, "no state dict that can be recognised"),
        ({**tensors, "bn1.bias": torch.zeros(64).to_sparse()}, "no state dict"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ResfeatError, match=told):
            load("resnet18", str(tmp_path / "weights.pth"))
    with pytest.raises(ResfeatError, match="do not fit resnet34"):
        load("resnet34", str(checkpoint))


@pytest.mark.parametrize("weights", ["random", "random:", "random:x", "random:-1", "V9", "a.bin"])
def test_names_that_mean_nothing_are_usage_errors(weights):
    with pytest.raises(UsageError, match="random:"):
        load("resnet18", weights)
    with pytest.raises(UsageError, match="does not exist"):
        load("resnet18", "missing.pth")
