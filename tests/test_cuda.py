"""The runtime for GPUs. What need not be a GPU runs on the CPU too, by `stand_in.py`."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import stand_in
import torch
from command import end_ray
from tables import rows

from resfeat import ExtractSpec, RuntimeOptions, extract, runtimes
from resfeat.backbones.ours import IMAGENET
from resfeat.backbones.weights import resolve
from resfeat.errors import DeviceLostError, ResfeatError
from resfeat.fidelity.parity import cosine
from resfeat.runtimes import cuda
from resfeat.runtimes.fused import fuse
from resfeat.runtimes.torch import TorchRuntime
from resfeat.spec import FeatureSpec, Identity
from resfeat.worker import Job, Placement
from resfeat.worker import worker as worker_module
from resfeat.worker.worker import Worker, forward, place_here

# A network for each device: the CPU takes as long for its small one.
MODELS = {"cpu": "cifar_resnet20", "cuda": "resnet50"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    with stand_in.gpu(request.param):
        yield request.param


@pytest.fixture(params=["fp32", pytest.param("bf16", marks=pytest.mark.gpu)])
def weights(request, device):
    return made(device, request.param)


def made(device, precision="fp32"):
    asked = FeatureSpec(model=MODELS[device], weights="random:0", precision=precision)
    return resolve(asked)


@pytest.fixture
def pixels(device):
    return pictures(made(device).identity, cuda.GPU_BATCH)


def pictures(identity, count, seed=0):
    crop = identity.preprocessing.crop
    return np.random.default_rng(seed).integers(0, 256, (count, crop, crop, 3), dtype=np.uint8)


@pytest.fixture
def replays(monkeypatch, device):
    """Every replay: by which thread, and of which graph."""
    seen, replay = [], torch.cuda.CUDAGraph.replay

    def noted(graph):
        seen.append((threading.get_ident(), graph))
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    return seen


def way_of(runtime):
    """How this thread computes full batches."""
    return runtime._own.lane._way


def eagerly(runtime, pixels):
    """The embeddings that the network of this runtime gives without a graph, in one go."""
    with torch.inference_mode():
        batch = torch.from_numpy(pixels).to(runtime._device)
        return fuse(runtime._embedder)(batch).cpu().numpy()


def test_a_graph_gives_the_bits_of_the_network_alone_every_time(weights, device, pixels, replays):
    runtime = stand_in.runtime(weights, device)
    others = pictures(weights.identity, cuda.GPU_BATCH, seed=1)
    expected, other = eagerly(runtime, pixels), eagerly(runtime, others)
    assert expected.dtype == np.float32 and not np.array_equal(expected, other)
    times = {"cpu": 3, "cuda": 100}[device]  # each replays it twice
    for _ in range(times):
        assert np.array_equal(runtime.embed(pixels), expected)
        assert np.array_equal(runtime.embed(others), other)
    assert len(replays) == 2 * times and len(set(replays)) == 1


def test_what_was_given_before_stays_as_it_was(device, pixels):
    runtime = stand_in.runtime(made(device), device)
    first = runtime.embed(pixels)
    kept = first.copy()
    runtime.embed(pixels[::-1].copy())
    assert np.array_equal(first, kept)


def test_an_image_gives_the_same_bits_wherever_it_lies(weights, device, pixels, replays):
    runtime = stand_in.runtime(weights, device)
    expected = runtime.embed(pixels)
    order = np.random.default_rng(0).permutation(cuda.GPU_BATCH)
    assert np.array_equal(runtime.embed(pixels[order]), expected[order])
    nearly_alone = np.zeros_like(pixels)
    nearly_alone[-1] = pixels[5]
    assert np.array_equal(runtime.embed(nearly_alone)[-1], expected[5])
    # In a batch of more: the pieces are the same.
    both = np.concatenate([nearly_alone, pixels])
    assert np.array_equal(runtime.embed(both)[cuda.GPU_BATCH :], expected)
    assert len(replays) == 5


def test_two_threads_at_once_have_a_graph_each(weights, device, replays):
    """The threads of a worker begin together, so their captures meet."""
    runtime = stand_in.runtime(weights, device)
    given = [pictures(weights.identity, cuda.GPU_BATCH, seed) for seed in range(2)]
    expected = [eagerly(runtime, each) for each in given]
    times, together = {"cpu": 3, "cuda": 50}[device], threading.Barrier(2)

    def run(which):
        results = []
        for _ in range(times):
            together.wait()
            results.append(runtime.embed(given[which]))
        return results

    with ThreadPoolExecutor(2) as pool:
        for which, results in enumerate(pool.map(run, range(2))):
            assert all(np.array_equal(each, expected[which]) for each in results)
    assert len(set(replays)) == 2


def test_a_capture_while_another_thread_pins_memory(device, pixels, replays):
    runtime, stop = stand_in.runtime(made(device), device), threading.Event()

    def pin():
        sizes = 0
        while not stop.is_set():  # of another size each time, or torch gives what it has pinned
            sizes += 1
            runtime.empty((sizes % 64 + 1, 512, 512, 3))
        return sizes

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        given = runtime.embed(pixels)
        stop.set()
        assert pinning.result() > 0
    assert np.array_equal(given, runtime.embed(pixels)) and len(replays) == 2


def test_a_network_that_cannot_be_captured_runs_all_the_same(
    weights, device, pixels, replays, monkeypatch
):
    tries = []

    def refuses(*args, **options):
        tries.append(args)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    runtime = stand_in.runtime(weights, device)
    expected = eagerly(runtime, pixels)
    for _ in range(2):
        assert np.array_equal(runtime.embed(pixels), expected)
    assert len(tries) == 1 and replays == []


@pytest.mark.parametrize("model", ["resnet20", "resnet20_b", "resnet20_c", "plain20", "highway20"])
def test_the_fused_network_computes_the_same(model, device):
    chance = torch.Generator().manual_seed(0)
    weights = resolve(FeatureSpec(model=f"cifar_{model}", weights="random:0"))
    tensors = {  # a new network's are all 0
        name: torch.rand(tensor.shape, generator=chance) if name.endswith("bias") else tensor
        for name, tensor in weights.tensors.items()
    }
    plain = TorchRuntime(weights.identity, tensors, device)
    images = pictures(weights.identity, 4)
    expected = plain.embed(images)
    fused = fuse(plain._embedder)
    with torch.inference_mode():
        given = fused(torch.from_numpy(images).to(device)).cpu().numpy()
    assert np.abs(given - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(plain.embed(images), expected)  # it has not changed
    shared = {each.data_ptr() for each in plain._embedder.parameters() if each.dim() == 4}
    assert {each.data_ptr() for each in fused.parameters() if each.dim() == 4} == shared


def test_the_network_of_another_library_is_not_fused():
    assert fuse(SimpleNamespace(network=torch.nn.Identity())) is None


class Odd(torch.nn.Module):
    """An embedder that gives other bits at other places of a batch of more than `most`."""

    def __init__(self, embedder, most):
        super().__init__()
        self.embedder, self.most = embedder, most

    def forward(self, pixels):
        vectors = self.embedder(pixels)
        if len(pixels) > self.most:
            places = torch.arange(len(vectors), device=vectors.device)
            vectors = vectors + 1e-3 * (places == 1).float()[:, None]
        return vectors


@pytest.mark.parametrize("share", [1, 2, 8])
def test_a_batch_is_computed_in_pieces_in_which_the_place_does_not_matter(
    share, device, pixels, replays, monkeypatch
):
    monkeypatch.setattr(cuda, "fuse", lambda embedder: None)
    runtime = stand_in.runtime(made(device), device)
    runtime._embedder = odd = Odd(runtime._embedder, cuda.GPU_BATCH // share)
    given = runtime.embed(pixels)
    assert (way_of(runtime).size, len(replays)) == (cuda.GPU_BATCH // share, share)
    assert runtime.steady
    with torch.inference_mode():
        pieces = torch.from_numpy(pixels).to(device).split(cuda.GPU_BATCH // share)
        expected = torch.cat([odd.embedder(piece) for piece in pieces])
    assert np.array_equal(given, expected.cpu().numpy())


def test_where_the_place_always_matters_that_is_told(device, pixels, monkeypatch):
    monkeypatch.setattr(cuda, "fuse", lambda embedder: None)
    runtime = stand_in.runtime(made(device), device)
    runtime._embedder = odd = Odd(runtime._embedder, 1)
    with torch.inference_mode():
        expected = odd(torch.from_numpy(pixels).to(device)).cpu().numpy()
    assert np.array_equal(runtime.embed(pixels), expected)
    assert not runtime.steady


class Unsound(torch.nn.Module):
    """A fused network that cuDNN has no kernel for, or one that reads what nobody has written."""

    def __init__(self, embedder, outcome):
        super().__init__()
        self.embedder, self.outcome = embedder, outcome

    def forward(self, pixels):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.embedder(pixels) * self.outcome


@pytest.mark.parametrize(
    "outcome",
    [
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        torch.nan,
    ],
    ids=str,
)
def test_a_network_that_cannot_be_fused_is_computed_as_it_is(
    outcome, device, pixels, replays, monkeypatch
):
    monkeypatch.setattr(cuda, "fuse", lambda embedder: Unsound(embedder, outcome))
    weights = made(device)
    runtime = stand_in.runtime(weights, device)
    expected = TorchRuntime(weights.identity, weights.tensors, device).embed(pixels)
    assert cosine(runtime.embed(pixels), expected).min() > 0.99999
    assert way_of(runtime).embedder is runtime._embedder and len(replays) > 0 and runtime.steady


class Limited(torch.nn.Module):
    """An embedder on a device that has memory for so many images at a time."""

    def __init__(self, embedder, holds):
        super().__init__()
        self.embedder, self.holds = embedder, holds

    def forward(self, pixels):
        if len(pixels) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")
        return self.embedder(pixels)


def bare_worker(runtime):
    worker = Worker.__new__(Worker)  # without its threads and its own model
    worker.fits, worker.runtime = cuda.GPU_BATCH, runtime
    return worker


@pytest.fixture
def limited(device, monkeypatch):
    """Give it a number to have a runtime on a device that holds so many images."""
    monkeypatch.setattr(cuda, "fuse", lambda embedder: None)

    def make(holds):
        runtime = stand_in.runtime(made(device), device)
        runtime._embedder = Limited(runtime._embedder, holds)
        return runtime

    return make


def test_a_batch_that_memory_does_not_hold_is_computed_in_pieces(device, pixels, replays, limited):
    expected = limited(cuda.GPU_BATCH).embed(pixels)
    runtime, size = limited(cuda.GPU_BATCH // 3), cuda.GPU_BATCH
    worker = bare_worker(runtime)
    assert cosine(forward(worker, pixels), expected).min() > 0.99999
    assert (worker.fits, way_of(runtime).size, len(replays)) == (size, size // 4, 1 + 4)


def test_memory_for_very_few_needs_no_graph(device, pixels, replays, limited):
    worker = bare_worker(limited(3 if device == "cuda" else 1))
    expected = stand_in.runtime(made(device), device).embed(pixels)
    assert cosine(forward(worker, pixels), expected).min() > 0.99999
    assert (worker.fits, len(replays)) == ({"cuda": 2, "cpu": 1}[device], 1)


def test_a_graph_is_given_up_once_memory_runs_short(device, pixels, replays):
    runtime = stand_in.runtime(made(device), device)
    worker = bare_worker(runtime)
    expected = forward(worker, pixels)
    assert way_of(runtime).graph
    worker.fits //= 4  # as another thread leaves it
    assert cosine(forward(worker, pixels), expected).min() > 0.99999
    assert way_of(runtime).graph is None and len(replays) == 1


@pytest.mark.gpu
def test_a_real_gpu_with_little_memory():
    weights = made("cuda")
    images = pictures(weights.identity, cuda.GPU_BATCH)
    expected = stand_in.runtime(weights, "cuda").embed(images)
    torch.cuda.empty_cache()
    try:
        # Room for the network and a few dozen images.
        total = torch.cuda.mem_get_info()[1]
        share = (torch.cuda.memory_reserved() + 700 * 2**20) / total
        runtime = stand_in.runtime(weights, "cuda", share)
        given = forward(bare_worker(runtime), images)
        assert way_of(runtime).size < cuda.GPU_BATCH
        assert cosine(given, expected).min() > 0.9999
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_memory_that_others_left_behind_is_not_read(precision):
    weights = made("cuda", precision)
    images = pictures(weights.identity, cuda.GPU_BATCH)
    expected = stand_in.runtime(weights, "cuda").embed(images)
    torch.cuda.empty_cache()
    # All sizes, in all streams' caches: of the default one, and of a thread's own.
    with ThreadPoolExecutor(1) as pool:
        runtime = stand_in.runtime(weights, "cuda")

        def poisoned():
            lane = cuda.Lane([fuse(runtime._embedder)], runtime._device)
            runtime._own.lane = lane
            with torch.cuda.stream(lane._stream):
                floats = [torch.full((2**n,), torch.nan, device="cuda") for n in range(6, 28)]
                floats += [torch.full((2**24,), torch.nan, device="cuda") for _ in range(40)]
                torch.cuda.synchronize()
                del floats
            return runtime.embed(images)

        given = pool.submit(poisoned).result()
    assert np.isfinite(given).all() and np.array_equal(given, expected)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    weights = made("cuda")
    images = pictures(weights.identity, cuda.GPU_BATCH)
    alone = TorchRuntime(weights.identity, weights.tensors, "cpu")
    given = stand_in.runtime(weights, "cuda").embed(images)
    assert cosine(given[:8], alone.embed(images[:8])).min() > 0.9999


@pytest.mark.gpu
def test_batches_are_put_together_in_pinned_memory():
    batch = stand_in.runtime(made("cuda"), "cuda").empty((cuda.GPU_BATCH, 8, 8, 3))
    assert torch.from_numpy(batch).is_pinned() and not batch.any()


@pytest.mark.gpu
@pytest.mark.ray
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_job_gives_the_same_bits_in_one_process_and_in_two_on_a_gpu(
    precision, photos, tmp_path
):
    end_ray()  # one that tests share may not know of the GPU
    reports = {}
    for name, options in {
        "inline": RuntimeOptions(workers=0),
        "shared": RuntimeOptions(workers=2, gpus_per_worker=0.5),
        "batches": RuntimeOptions(workers=0, batch_size=300),
    }.items():
        spec = ExtractSpec(
            sources=(str(photos),),
            output=str(tmp_path / name),
            weights="random:0",
            precision=precision,
            shard_size=100,
            runtime=options,
        )
        reports[name] = extract(spec)
        assert reports[name].embedded == reports[name].items == 500
        assert reports[name].engine["device"] == "cuda"
    assert (reports["shared"].engine["workers"], reports["shared"].engine["gpus"]) == (2, 0.5)
    for name in ("shared", "batches"):
        assert rows(tmp_path / name).equals(rows(tmp_path / "inline"))


IDENTITY = Identity(model="resnet18", weights_digest="", preprocessing=IMAGENET)


@pytest.mark.parametrize(
    ("asked", "given"), [(None, 256), (1, 256), (256, 256), (257, 512), (600, 768)]
)
def test_a_gpu_computes_the_same_batches_whatever_size_is_asked_for(asked, given):
    options = RuntimeOptions(batch_size=asked)
    assert Placement.of(options, IDENTITY, 0.25, 2).batch_size == given
    assert Placement.of(RuntimeOptions(batch_size=100), IDENTITY, 0, 2).batch_size == 100


def test_a_share_of_a_gpu_is_a_share_of_its_memory(device, monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    for share in (1.0, 0.25):
        stand_in.runtime(made(device), device, share)
    assert told == [0.25]


def job_and_network(share):
    weights = made("cpu")
    job = Job(output="", share="", sources=(), reads_ahead=1, identity=weights.identity,
              dims=weights.dims, with_label=False)  # fmt: skip
    placement = Placement(runtime="torch", device="cpu", cpus=1, batch_size=4, gpus=share)
    return job, placement, worker_module.network_for(job, placement, weights.tensors)


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (0.25, r"a worker's share \(0.25\) of the GPU's memory does not hold .* give a larger "
               r"--gpus-per-worker, or .*Tried to allocate"),
        (1.0, "the device's memory does not hold .* see what else is on it, or .*Tried to"),
    ],
)  # fmt: skip
def test_memory_for_not_even_one_image_is_one_line_with_the_way_out(share, says, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has")

    job, placement, network = job_and_network(share)
    with monkeypatch.context() as patched, pytest.raises(ResfeatError, match=says) as raised:
        patched.setattr(runtimes, "start", full)  # the network alone is too much
        Worker(job, placement, network)
    assert "\n" not in str(raised.value)
    worker = Worker(job, placement, network)
    worker.runtime = SimpleNamespace(embed=full, empty=worker.runtime.empty)
    with pytest.raises(ResfeatError, match=says):
        worker.embed([np.zeros((32, 32, 3), np.uint8)])
    worker.close()


@contextmanager
def nothing_here(said):
    """A machine on which torch is built for CUDA 13.2 and cannot start it, saying so."""

    def init():
        if said:
            raise RuntimeError(said)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.version, "cuda", "13.2")
        patched.setattr(torch.cuda, "is_available", lambda: False)
        patched.setattr(torch.cuda, "init", init)
        yield


OLD = ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
       "driver by downloading and installing a new version from the URL: ...")  # fmt: skip


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (OLD, r"the NVIDIA driver is too old \(it can do CUDA 11.4, torch is built for 13.2\): "
              "install a newer driver, or a torch for CUDA 11, or give --gpus-per-worker 0"),
        ("Found no NVIDIA driver on your system.", "torch finds no NVIDIA driver: install it, or"),
        ("", "torch sees no GPU: check the driver and CUDA_VISIBLE_DEVICES, or"),
    ],
)  # fmt: skip
def test_why_there_is_no_gpu(said, told):
    with nothing_here(said), pytest.raises(ResfeatError, match=f"a GPU was asked for, and {told}"):
        place_here(RuntimeOptions(workers=0, gpus_per_worker=1), IDENTITY)


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.why_no_gpu() == "torch is built without CUDA: install a CUDA build of it"


LOST = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (torch.AcceleratorError(LOST), DeviceLostError),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceLostError),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), torch.OutOfMemoryError),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), torch.OutOfMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("The size of tensor a must match"), RuntimeError),
    ],
    ids=lambda each: str(each).partition("\n")[0],
)
def test_what_cuda_says_is_told_apart(raised, becomes, device, pixels, monkeypatch):
    monkeypatch.setattr(cuda, "fuse", lambda embedder: None)
    runtime = stand_in.runtime(made(device), device)

    def fails(pixels):
        raise raised

    runtime._embedder = fails
    with pytest.raises(becomes) as told:
        runtime.embed(pixels)
    assert type(told.value) is becomes
    if becomes is DeviceLostError:
        assert "\n" not in str(told.value)
        assert "nvidia-smi" in str(told.value) and "it resumes" in str(told.value)


class Dying:
    """A GPU that fails at its third batch, and from then on."""

    steady = True

    def __init__(self, runtime):
        self.runtime, self.empty, self.batches = runtime, runtime.empty, 0

    def embed(self, pixels):
        self.batches += 1
        with cuda.device_errors():
            if self.batches > 2:
                raise torch.AcceleratorError(LOST)
            return self.runtime.embed(pixels)


def test_a_gpu_that_fails_on_the_way_ends_the_run_which_then_resumes(photos, tmp_path, monkeypatch):
    spec = ExtractSpec(
        sources=(str(photos / "chelsea"),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        shard_size=16,
        runtime=RuntimeOptions(workers=0, runtime="torch"),
    )
    start = runtimes.start
    with monkeypatch.context() as patched:
        patched.setattr(runtimes, "start", lambda *a, **k: Dying(start(*a, **k)))
        with pytest.raises(ResfeatError, match=r"^the GPU of .*unspecified.* it resumes$"):
            extract(spec)
    report = extract(spec)
    assert report.embedded == report.items and 0 < report.shards < 4
    undisturbed = extract(replace(spec, output=str(tmp_path / "undisturbed")))
    assert undisturbed.shards == 4
    assert rows(tmp_path / "out").equals(rows(tmp_path / "undisturbed"))
