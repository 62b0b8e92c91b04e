"""Weights: found, checked and identified, or refused in one line with nothing executed."""

import argparse
import io
import json
import os
import pickle
import socket
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from later import Later
from reference import torchvision_model

from resfeat.backbones import build
from resfeat.backbones.checkpoint import origin_of, strip
from resfeat.backbones.weights import resolve
from resfeat.errors import ResfeatError, UsageError
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import FeatureSpec

timm = Later("timm")
models = Later("torchvision.models")


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
    entry = models.ResNet50_Weights[name]
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
    url = models.ResNet50_Weights.DEFAULT.url
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


def training_script(kind, tensors, other):
    """A checkpoint as a training script of this kind writes it, with its content's other half."""

    def prefixed(prefix, some=tensors):
        return {prefix + name: tensor for name, tensor in some.items()}

    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    args = argparse.Namespace(lr=0.1, arch="resnet18", data="/data")
    if kind == "DataParallel":
        return {
            "epoch": 90,
            "arch": "resnet18",
            "state_dict": prefixed("module."),
            "best_acc1": torch.tensor(70.0),
            "optimizer": {"state": {}, "param_groups": []},
        }
    if kind == "Lightning":
        return {
            "pytorch-lightning_version": "2.5.0",
            "global_step": 7,
            "callbacks": {},
            "state_dict": prefixed("model.") | {"criterion.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1},
        }
    if kind == "timm":
        return {
            "epoch": 3,
            "arch": "resnet18",
            "state_dict": other,
            "args": args,
            "state_dict_ema": tensors,
            "version": 2,
            "metric": 1.0,
        }
    if kind == "MoCo":
        head = {"fc.0.weight": torch.zeros(9, 9), "fc.2.weight": torch.zeros(9, 9)}
        return {
            "epoch": 199,
            "arch": "resnet18",
            "state_dict": prefixed("module.encoder_q.", headless | head)
            | prefixed("module.encoder_k.", other)
            | {"module.queue": torch.zeros(128, 64), "module.queue_ptr": torch.zeros(1)},
        }
    if kind == "MoCo v3":
        return {
            "state_dict": prefixed("module.momentum_encoder.", other)
            | prefixed("module.base_encoder.")
            | prefixed("module.predictor.", {"0.weight": torch.ones(2)})
        }
    if kind == "DINO":
        head = {
            "head.mlp.0.weight": torch.zeros(9, 9),
            "head.last_layer.weight_g": torch.ones(9, 1),
        }
        return {
            "student": prefixed("module.backbone.", other),
            "epoch": 99,
            "args": args,
            "teacher": prefixed("backbone.", headless) | head,
            "dino_loss": {"center": torch.zeros(1, 9)},
        }
    if kind == "torch.compile":
        return prefixed("_orig_mod.")
    assert kind == "SwAV"
    return prefixed("module.", headless) | {
        "module.projection_head.0.weight": torch.zeros(9, 9),
        "module.prototypes.weight": torch.zeros(9, 9),
    }


TOLD = {
    "DataParallel": "took 'state_dict', stripped 'module.' from the names",
    "Lightning": "took 'state_dict', stripped 'model.' from the names, left out criterion",
    "timm": "took 'state_dict_ema'",
    "MoCo": "stripped 'module.encoder_q.' from the names, left out module.encoder_k, module.queue",
    "MoCo v3": "took 'state_dict', stripped 'module.base_encoder.' from the names",
    "DINO": "took 'teacher', stripped 'backbone.' from the names, left out head",
    "torch.compile": "stripped '_orig_mod.' from the names",
    "SwAV": "stripped 'module.' from the names, left out",
}


@pytest.mark.parametrize("kind", TOLD)
def test_checkpoints_of_training_scripts_give_the_vectors_of_their_network(
    kind, checkpoint, tmp_path
):
    tensors = torch.load(checkpoint, weights_only=True)
    other = {name: tensor * 2 for name, tensor in tensors.items()}
    torch.save(training_script(kind, tensors, other), tmp_path / "checkpoint.pth")
    weights = load("resnet18", str(tmp_path / "checkpoint.pth"))
    (note,) = weights.notes
    assert TOLD[kind] in note

    theirs = models.get_model("resnet18")
    theirs.load_state_dict(tensors)
    theirs.fc = torch.nn.Identity()
    runtime = TorchRuntime(weights.identity, weights.tensors, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    preprocessing = weights.identity.preprocessing
    x = (pixels / np.float32(255) - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    with torch.inference_mode():
        expected = theirs.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    assert np.abs(runtime.embed(pixels) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_copy_that_is_meant_is_taken_even_if_it_lacks_something(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    older = {name: t for name, t in tensors.items() if "num_batches_tracked" not in name}
    other = {f"student.{name}": t * 2 for name, t in tensors.items()}
    torch.save(other | {f"teacher.{name}": t for name, t in older.items()}, tmp_path / "w.pth")
    assert (
        load("resnet18", str(tmp_path / "w.pth")).identity
        == load("resnet18", str(checkpoint)).identity
    )
    del older["layer1.0.conv1.weight"]
    torch.save(other | {f"teacher.{name}": t for name, t in older.items()}, tmp_path / "w.pth")
    with pytest.raises(ResfeatError, match=r"resnet18: layer1\.0\.conv1\.weight is missing; give"):
        load("resnet18", str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["w.ckpt", "w.pth.tar", "w.bin", "a#b?.pth", "W.PTH", "no-suffix"])
def test_any_file_is_looked_into(name, checkpoint, tmp_path):
    (tmp_path / name).write_bytes(checkpoint.read_bytes())
    given = load("resnet18", str(tmp_path / name)).identity
    assert given == load("resnet18", str(checkpoint)).identity


@pytest.mark.parametrize("address", ["http://[bad/x.pth", "https://localhost:1/a b.pth",
                                     "https://me:word@localhost/x.pth", "s3://"])  # fmt: skip
def test_addresses_that_cannot_be_are_one_line(address):
    with pytest.raises(ResfeatError) as raised:
        load("resnet18", address)
    assert "word" not in str(raised.value).replace("password", "") and "\n" not in str(raised.value)


def test_a_network_of_timm_fits_ours(tmp_path):
    """timm's names for the ResNets of the paper are torchvision's, and so are ours."""
    torch.manual_seed(0)
    theirs = timm.create_model("resnet50", num_classes=10).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    weights = load("resnet50", str(tmp_path / "timm.safetensors"))
    assert weights.notes == ()  # the head of ten classes is left out without a word
    x = torch.randn(2, 3, 224, 224)
    ours = build("resnet50", 224)
    ours.load_state_dict(weights.tensors, strict=False)
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        given = ours(x, ["avgpool"])["avgpool"].mean((2, 3))
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_few_names_under_a_prefix_are_no_copy_of_the_network():
    names = [f"layer1.{n}.weight" for n in range(8)]
    tensors = {f"student.{name}": torch.zeros(1) for name in names}
    tensors |= {f"teacher.{name}": torch.ones(1) for name in names[:2]}
    kept, prefix, left_out = strip(tensors, names, ("fc",))
    assert prefix == "student." and list(kept) == names and left_out == ["teacher"]


def test_two_copies_of_which_neither_is_known_are_not_chosen_between(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    two = {f"{side}.{name}": t for side in ("left", "right") for name, t in tensors.items()}
    torch.save(two, tmp_path / "two.pth")
    with pytest.raises(ResfeatError, match=r"2 copies .* under left\., right\."):
        load("resnet18", str(tmp_path / "two.pth"))


def test_a_checkpoint_of_another_depth_is_refused_by_its_keys(tmp_path):
    for depth, asked, told in (
        (34, 18, "layer1.2.conv1.weight is unknown"),
        (18, 34, "layer1.2.conv1.weight is missing"),
        (50, 18, "layer1.0.conv3.weight is unknown"),
        (18, 50, "layer1.0.downsample.0.weight is missing"),
    ):
        torch.save(models.get_model(f"resnet{depth}").state_dict(), tmp_path / "w.pth")
        told_all = f"do not fit resnet{asked}: .*and .* more; give --model resnet{depth}$"
        with pytest.raises(ResfeatError, match=told_all):
            load(f"resnet{asked}", str(tmp_path / "w.pth"))
        with pytest.raises(ResfeatError, match=told):
            load(f"resnet{asked}", str(tmp_path / "w.pth"))


def test_whole_numbers_among_the_tensors_stay_whole():
    """Swin's table of relative positions is one."""
    tensors = load("torchvision:swin_t", "random:0").tensors
    assert any(not tensor.is_floating_point() for tensor in tensors.values())


def test_what_must_not_be_written_down_is_not_in_the_origin():
    for given, kept in (
        ("https://me:word@host/w.pth?signature=x", "https://host/w.pth"),
        ("s3://key:word@bucket/w.pth?region=eu", "s3://bucket/w.pth?region=eu"),
        ("https://host/w.pth#secret", "https://host/w.pth"),
        ("gs://anonymous@bucket/w.pth", "gs://bucket/w.pth"),
        ("HTTPS://me:word@host/w.pth?signature=x", "HTTPS://host/w.pth"),
        ("az://box/w.pth?sv=2024&sig=x", "az://box/w.pth"),
        ("abfss://box@account/w.pth", "abfss://box@account/w.pth"),
        ("/data/w.pth", "/data/w.pth"),
    ):
        assert origin_of(given) == kept


class Canary:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_files(canary):
    """Files that would run code, or make a careless reader run out of memory or bounds."""
    code = pickle.dumps(Canary(canary))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as inside:
        inside.writestr("archive/data.pkl", code)
        inside.writestr("archive/version", "3\n")

    def tensors(data, **headers):
        described = json.dumps(
            {name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
             for name, (shape, offsets) in headers.items()}
        ).encode()  # fmt: skip
        return struct.pack("<Q", len(described)) + described + data

    return {
        "evil.pth": code,
        "evil.pt": code,
        "zipped.pth": archive.getvalue(),
        "evil.safetensors": code,
        "huge_header.safetensors": struct.pack("<Q", 1 << 62) + b"{}",
        "huge_tensor.safetensors": tensors(b"", a=([1 << 40], [0, 1 << 42])),
        "overlap.safetensors": tensors(bytes(12), a=([2], [0, 8]), b=([2], [4, 12])),
        "truncated.safetensors": tensors(bytes(10), a=([1000], [0, 4000])),
        "empty.pth": b"",
        "empty.safetensors": b"",
        "text.pth": b"not weights",
        "nan.safetensors": tensors(
            struct.pack("<f", float("nan")), **{"conv1.weight": ([1], [0, 4])}
        ),
    }


@pytest.mark.parametrize("name", hostile_files(Path("nowhere")))
def test_hostile_files_are_refused_and_nothing_in_them_is_run(name, tmp_path):
    (tmp_path / name).write_bytes(hostile_files(tmp_path / "ran")[name])
    started = time.monotonic()
    with pytest.raises(ResfeatError, match=r"never run|do not fit|no state dict") as raised:
        load("resnet18", str(tmp_path / name))
    assert time.monotonic() - started < 5
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_named(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    missing = {name: t for name, t in tensors.items() if name != "layer1.0.bn1.weight"}
    misshapen = {**tensors, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    unknown = {**tensors, "layer1.5.extra.weight": torch.zeros(1)}
    broken = {**tensors, "bn1.bias": tensors["bn1.bias"].clone()}
    broken["bn1.bias"][7] = float("nan")
    for content, told in (
        (missing, "layer1.0.bn1.weight is missing"),
        (misshapen, r"conv1.weight is \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)"),
        (unknown, "layer1.5.extra.weight is unknown"),
        (broken, "bn1.bias has values that are not finite"),
        ({**tensors, "layer5.0.conv1.weight": torch.zeros(1)}, "layer5.0.conv1.weight is unknown"),
        ({**tensors, "bn1.bias": torch.zeros(64, dtype=torch.int8)}, "bn1.bias holds int8 values"),
        ({**tensors, "bn1.bias": torch.zeros(64, device="meta")}, "without content"),
        ({**tensors, "bn1.bias": torch.zeros(64, dtype=torch.complex64)}, "holds complex64 values"),
        ({"weights of mine": tensors}, "no state dict that can be recognised"),
        ({1: torch.zeros(1)}, "no state dict that can be recognised"),
        ({**tensors, "bn1.bias": torch.zeros(64).to_sparse()}, "no state dict"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ResfeatError, match=told):
            load("resnet18", str(tmp_path / "weights.pth"))
    with pytest.raises(ResfeatError, match="do not fit resnet34"):
        load("resnet34", str(checkpoint))


@pytest.mark.parametrize("weights", ["random", "random:", "random:x", "random:-1", "V9", "a.onnx"])
def test_names_that_mean_nothing_are_usage_errors(weights):
    with pytest.raises(UsageError, match="random:"):
        load("resnet18", weights)
    with pytest.raises(UsageError, match="does not exist"):
        load("resnet18", "missing.pth")
