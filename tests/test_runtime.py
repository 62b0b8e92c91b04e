"""The runtimes: near to each other, and the same bits in every setting that may change."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from resfeat import runtimes
from resfeat.backbones import build
from resfeat.backbones.weights import resolve
from resfeat.errors import ResfeatError, Stopped, UsageError
from resfeat.fidelity.parity import cosine
from resfeat.runtimes import hardware
from resfeat.runtimes.embedder import fold_batch_norm
from resfeat.runtimes.openvino import OpenVINORuntime, convert, has_bf16, load, quantise
from resfeat.runtimes.torch import TorchRuntime, use_one_core
from resfeat.spec import FeatureSpec
from resfeat.worker.messages import Placement
from resfeat.worker.worker import Worker, forward

BATCH = 4
MORE = pytest.mark.more


@pytest.fixture(scope="module")
def weights():
    return resolve(FeatureSpec(model="resnet18", weights="random:0"))


@pytest.fixture(scope="module")
def runtime(weights):
    return TorchRuntime(weights.identity, weights.tensors, "cpu")


@pytest.fixture(scope="module")
def pixels(photos):
    from resfeat.decoding.decode import decode

    identity = resolve(FeatureSpec(model="resnet18", weights="random:0")).identity
    paths = sorted(photos.rglob("*.jpg"))[:: len(list(photos.rglob("*.jpg"))) // 8][:8]
    return np.stack(
        [decode(path.read_bytes(), identity.preprocessing, "turbo").pixels for path in paths]
    )


def openvino(weights, precision="fp32", threads=2, quantised=None):
    identity = replace(weights.identity, precision=precision)
    network = load(quantised) if quantised else convert(identity, weights.tensors)
    return OpenVINORuntime(identity, network, threads, BATCH)


def embed(runtime, pixels):
    return np.concatenate(
        [runtime.embed(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
    )


def test_neighbours_in_the_batch_do_not_matter(runtime, weights, pixels):
    for each in runtime, openvino(weights):
        alone = np.zeros_like(pixels[:BATCH])
        alone[3] = pixels[3]
        assert np.array_equal(each.embed(pixels[:BATCH])[3], each.embed(alone)[3])


def test_each_layer_is_scaled_to_unit_length_by_itself(weights, pixels):
    layers = {"layers": ("layer2", "avgpool")}
    plain, scaled = (
        TorchRuntime(replace(weights.identity, normalize=wanted, **layers), weights.tensors, "cpu")
        for wanted in (False, True)
    )
    given, expected = scaled.embed(pixels[:BATCH]), plain.embed(pixels[:BATCH])
    for layer in (slice(0, 128), slice(128, None)):
        lengths = np.linalg.norm(expected[:, layer], axis=1, keepdims=True)
        assert np.allclose(given[:, layer], expected[:, layer] / lengths, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("350000 100000", 3), ("1600000 100000", 8), ("50000 100000", 1)],
)
def test_no_more_cores_than_the_container_is_given(quota, cores, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(hardware, "open", lambda *_, **__: io.StringIO(quota), raising=False)
    assert hardware.cpu_count() == cores


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


@pytest.mark.parametrize(
    "choices",
    [
        {"model": "resnet50"},
        {"model": "resnet18", "layers": ("layer2", "avgpool"), "pool": "gem", "normalize": True},
        pytest.param({"model": "resnext50_32x4d", "pool": "max"}, marks=MORE),
        pytest.param({"model": "highway18"}, marks=MORE),
        {"model": "cifar_resnet20"},  # shortcut A: subsample and pad
        {"model": "torchvision:squeezenet1_1"},
    ],
    ids=lambda choices: choices["model"],
)
def test_openvino_in_fp32_differs_from_torch_by_rounding_only(choices):
    made = resolve(FeatureSpec(weights="random:0", **choices))
    crop = made.identity.preprocessing.crop
    chance = np.random.default_rng(0)
    pictures = chance.integers(0, 256, (BATCH, crop, crop, 3), dtype=np.uint8)
    expected = TorchRuntime(made.identity, made.tensors, "cpu").embed(pictures)
    given = openvino(made).embed(pictures)
    assert given.shape == expected.shape and given.dtype == np.float32
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()


def test_openvino_gives_the_same_bits_in_any_number_of_threads(weights, pixels):
    expected = embed(openvino(weights, threads=1), pixels)
    many = openvino(weights, threads=3)
    with ThreadPoolExecutor(3) as pool:
        for given in pool.map(lambda _: embed(many, pixels), range(6)):
            assert np.array_equal(given, expected)


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")
def test_openvino_in_bf16_is_near_to_fp32_and_is_not_fp32(weights, runtime, pixels):
    cosines = cosine(embed(openvino(weights, "bf16"), pixels), runtime.embed(pixels))
    assert 0.999 < cosines.min() < 0.9999999


@pytest.mark.more  # integration/test_int8.py has it once
def test_int8_is_near_to_fp32_and_the_same_when_it_is_made_again(
    weights, runtime, pixels, tmp_path
):
    given = []
    for name in "first", "second":
        network = tmp_path / f"{name}.xml"
        used = []

        def told(*counts, used=used):
            used.append(counts)

        quantise(weights.identity, weights.tensors, lambda: list(pixels), network, told)
        assert used == [(n, len(pixels)) for n in range(len(pixels))]
        given.append(embed(openvino(weights, "int8", quantised=network), pixels))
    assert np.array_equal(*given)
    cosines = cosine(given[0], runtime.embed(pixels))
    assert 0.99 < cosines.min() < 0.999999


def test_pictures_are_asked_for_once_the_network_is_traced(weights, tmp_path, monkeypatch):
    """They may be decoded meanwhile."""
    traced = []

    def pictures():
        assert traced
        raise Stopped("enough")

    monkeypatch.setattr("resfeat.runtimes.openvino._traced", traced.append)
    with pytest.raises(Stopped):
        quantise(weights.identity, weights.tensors, pictures, tmp_path / "network.xml")


def test_nothing_is_told_to_the_makers_of_openvino(tmp_path):
    """Their telemetry keeps its files in the home folder as soon as openvino is imported."""
    code = (
        "import resfeat.runtimes.openvino, nncf, sys;"
        "assert 'openvino_telemetry.main' not in sys.modules;"
        "print(type(nncf.telemetry.telemetry).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "MagicMock"), done.stderr
    assert not (tmp_path / "intel").exists()


@pytest.mark.parametrize(
    ("asked", "model", "precision", "device", "given"),
    [
        (None, "resnet50", "fp32", "cpu", "openvino"),
        (None, "resnet50", "int8", "cpu", "openvino"),
        (None, "resnet50", "fp16", "cpu", "torch"),
        (None, "timm:resnet50", "fp32", "cpu", "torch"),
        ("openvino", "timm:resnet50", "fp32", "cpu", "openvino"),
        ("torch", "resnet50", "fp32", "cpu", "torch"),
        (None, "resnet50", "bf16", "cuda", "torch"),
    ],
)
def test_the_runtime_that_is_chosen(asked, model, precision, device, given):
    assert runtimes.choose(asked, model, precision, device) == given


@pytest.mark.parametrize(
    ("asked", "precision", "device", "says"),
    [
        ("openvino", "fp16", "cpu", "--runtime openvino has no fp16: give --precision fp32 or"),
        ("torch", "int8", "cpu", "--runtime torch has no int8: give --runtime openvino"),
        (None, "int8", "cuda", "--precision int8 is for CPUs.* give --gpus-per-worker 0"),
        ("openvino", "fp32", "cuda", "--runtime openvino is for CPUs.* give --gpus-per-worker 0"),
    ],
)
def test_what_no_runtime_has_is_refused(asked, precision, device, says):
    with pytest.raises(UsageError, match=says):
        runtimes.choose(asked, "resnet50", precision, device)


def test_what_this_machine_lacks_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    assert runtimes.choose(None, "resnet50", "fp32", "cpu") == "torch"
    for asked, precision in (("openvino", "fp32"), (None, "int8")):
        with pytest.raises(UsageError, match=r"not installed: pip install 'resfeat\[int8\]'"):
            runtimes.choose(asked, "resnet50", precision, "cpu")
    monkeypatch.undo()
    monkeypatch.setattr(runtimes, "_has_bf16", lambda: False)
    assert runtimes.choose(None, "resnet50", "bf16", "cpu") == "torch"
    with pytest.raises(UsageError, match="needs a CPU with bf16 instructions"):
        runtimes.choose("openvino", "resnet50", "bf16", "cpu")


def test_a_network_that_openvino_cannot_run_is_refused_with_the_way_out(weights, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no such operation")

    monkeypatch.setattr("resfeat.runtimes.openvino.openvino.convert_model", fails)
    # As with a network of another library, whose operations are not known here.
    monkeypatch.setattr("resfeat.runtimes.openvino.ResNet", type("Another", (), {}))
    with pytest.raises(ResfeatError, match=r"no such operation.*--runtime torch"):
        openvino(weights)


HOST = """
import os, sys, warnings
from concurrent.futures import ThreadPoolExecutor
import torch
from resfeat import ExtractSpec, RuntimeOptions, extract

def seen():
    with ThreadPoolExecutor(1) as pool:
        new_thread = pool.submit(torch.get_num_threads).result()
    threads = torch.get_num_threads(), new_thread
    return {"threads": threads, "filters": list(warnings.filters), "environment": dict(os.environ)}

before = seen()
extract(ExtractSpec(sources=(sys.argv[1],), output=sys.argv[2], model="cifar_resnet20",
                    weights="random:0", runtime=RuntimeOptions(workers=0, runtime=sys.argv[3])))
after = seen()
print(*[name for name in before if before[name] != after[name]])
"""


@pytest.mark.parametrize("runtime", ["openvino", pytest.param("torch", marks=MORE)])
def test_a_host_program_keeps_its_threads_warnings_and_environment(runtime, photos, tmp_path):
    """In a process of its own, since what other tests have imported would hide a change."""
    arguments = [str(photos / "rocket"), str(tmp_path / "out"), runtime]
    done = subprocess.run([sys.executable, "-c", HOST, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_a_thread_that_uses_one_core_leaves_the_others_theirs():
    image, kernel = torch.ones(1, 8, 64, 64), torch.ones(8, 8, 3, 3)
    before = torch.get_num_threads()

    def cores(_):
        torch.nn.functional.conv2d(image, kernel)
        return torch.get_num_threads()

    with ThreadPoolExecutor(3, initializer=use_one_core) as pool:
        assert set(pool.map(cores, range(30))) == {1}
    with ThreadPoolExecutor(1) as pool:
        assert [*pool.map(cores, range(1)), torch.get_num_threads()] == [before, before]


class SmallDevice:
    """Runs on torch, and has memory for so many images only."""

    def __init__(self, runtime, fits):
        self.runtime, self.fits, self.sizes = runtime, fits, []

    def embed(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return self.runtime.embed(pixels)


def test_a_batch_that_the_device_does_not_hold_is_halved_and_stays_so(runtime, pixels, tmp_path):
    worker = Worker.__new__(Worker)  # without its threads and its own model
    worker.placement = Placement(runtime="torch", device="cpu", cpus=1, batch_size=8)
    worker.fits = 8
    worker.runtime = SmallDevice(runtime, 3)
    expected = runtime.embed(pixels)
    for _ in range(2):
        assert np.allclose(forward(worker, pixels), expected, rtol=1e-4, atol=1e-6)
    assert worker.fits == 2
    assert worker.runtime.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    worker.runtime = SmallDevice(runtime, 0)
    with pytest.raises(torch.OutOfMemoryError):
        forward(worker, pixels)
