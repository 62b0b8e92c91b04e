"""Parity with fp32 on torch: what is measured, and what it stops."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tables import listed, rows, vectors

from resfeat import ExtractSpec, RuntimeOptions, extract, fidelity, sources
from resfeat.backbones.weights import resolve
from resfeat.dataset import Layout, Record
from resfeat.errors import ResfeatError
from resfeat.fidelity import Parity, check, compare, differs
from resfeat.fidelity.parity import SAMPLE_OF_REFERENCE, Reference, cosine
from resfeat.fidelity.sample import (
    CALIBRATION,
    CANDIDATES,
    SAMPLE,
    for_calibration,
    for_parity,
    sample,
)
from resfeat.plan import write_plan
from resfeat.sources import Item
from resfeat.spec import FeatureSpec, Identity, Preprocessing, SourceOptions
from resfeat.worker import Placement
from resfeat.worker import worker as worker_module
from resfeat.worker.batches import Batches
from resfeat.worker.worker import Worker

PREPROCESSING = Preprocessing(
    resize=232, crop=224, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
)


def identity(precision):
    return Identity(
        model="resnet50", weights_digest="", preprocessing=PREPROCESSING, precision=precision
    )


def test_cosine_of_rows():
    a = np.array([[1, 0], [1, 1], [0, 0], [0, 0], [np.nan, 1], [2e38, 2e38]], np.float32)
    b = np.array([[0, 1], [2, 2], [0, 0], [1, 0], [1, 1], [2e38, 2e38]], np.float32)
    assert cosine(a, b) == pytest.approx([0, 1, 1, -1, -1, 1])


@pytest.mark.parametrize(
    ("precision", "minimum", "least", "passes"),
    [
        ("bf16", 0.9991, None, True),
        ("bf16", 0.9989, None, False),
        ("int8", 0.991, None, True),
        ("int8", 0.989, None, False),
        ("int8", 0.991, 0.999, False),
        ("bf16", 0.5, 0.4, True),
        ("bf16", float("nan"), -1, False),
    ],
)
def test_too_far_from_the_reference_is_an_error(precision, minimum, least, passes):
    parity = Parity(32, minimum, 1.0)
    if passes:
        check(parity, identity(precision), least)
        return
    with pytest.raises(ResfeatError, match=f"{precision} embeddings of 32 .* --precision fp32"):
        check(parity, identity(precision), least)


def test_a_single_bad_layer_is_seen():
    """Each layer is compared by itself: put together, a long one would hide a short one."""
    expected = np.array([[1000, 0, 1, 0], [0, 1000, 1, 0]], np.float32)
    given = np.array([[1000, 0, 1, 0], [0, 1000, 0, 1]], np.float32)
    parity = compare(given, Reference([], expected), identity("bf16"), {"a": 2, "b": 2})
    assert parity == Parity(2, pytest.approx(0), pytest.approx(1))
    assert cosine(given, expected).min() > 0.999


def test_rows_behind_one_that_is_not_finite_are_compared_with_their_own():
    expected = np.eye(3, dtype=np.float32)
    given = np.float32([[1, 0, 0], [0, np.inf, 0], [0, 0, 1]])
    parity = compare(given, Reference([], expected), identity("bf16"), {"avgpool": 3})
    assert parity == Parity(2, 1.0, 1.0)


def planned(folder, listing, shard_size):
    layout = Layout(folder)
    layout.plan.mkdir(parents=True)
    layout.tmp.mkdir(parents=True)
    return layout, write_plan(layout.plan, layout.tmp, listed(listing), shard_size)


def record_of(plan, identity):
    return Record(identity=identity, weights="", sources=(), source_options=SourceOptions(),
                  plan=plan, created="", versions={})  # fmt: skip


def numbered(folder, items, shard_size):
    """A plan of items that are numbered and not there."""
    return planned(
        folder, (Item(f"{n:05d}", f"file:///{n}", 1, 1) for n in range(items)), shard_size
    )


@settings(max_examples=8, deadline=None)
@example(2688, 3000)  # here two samples that are drawn apart overlap
@given(st.integers(SAMPLE + CALIBRATION, 1000), st.integers(50, 1000))
def test_int8_is_not_measured_on_what_it_was_calibrated_on(tmp_path_factory, items, shard_size):
    layout, plan = numbered(tmp_path_factory.mktemp("plan"), items, shard_size)
    record = record_of(plan, identity("int8"))
    measured, calibrated = for_parity(layout, record), for_calibration(layout, record)
    assert not set(measured[:SAMPLE]).intersection(calibrated[:CALIBRATION])


def test_int8_is_calibrated_and_measured_on_pictures_of_its_own(photos, tmp_path, monkeypatch):
    """The pictures that quantisation is really given, and those of the reference."""
    weights = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0", precision="int8",
                                  decode="pillow"))  # fmt: skip
    layout, plan = planned(tmp_path / "out", sources.listing([str(photos)]), None)
    calibrated = []

    def quantise(identity, tensors, pictures, network, on_picture):
        calibrated.extend(pictures())
        for suffix in (".xml", ".bin"):
            network.with_suffix(suffix).write_bytes(b"")

    monkeypatch.setattr("resfeat.runtimes.openvino.quantise", quantise)
    record = fidelity.calibrate(layout, record_of(plan, weights.identity), weights, print)
    measured = fidelity.reference(layout, record, weights.tensors).pictures
    assert (len(calibrated), len(measured)) == (CALIBRATION, SAMPLE)
    assert not {each.tobytes() for each in calibrated} & {each.tobytes() for each in measured}


@pytest.mark.parametrize(
    ("precision", "runtime", "device", "given"),
    [
        ("fp32", "torch", "cpu", False),
        ("fp32", "torch", "cuda", True),
        ("fp32", "openvino", "cpu", True),
        ("bf16", "torch", "cpu", True),
    ],
)
def test_all_but_torch_in_fp32_on_a_cpu_is_held_against_it(precision, runtime, device, given):
    gpus = 1.0 if device == "cuda" else 0.0
    placement = replace(
        Placement.of(RuntimeOptions(), identity(precision), gpus, 1), runtime=runtime
    )
    assert differs(identity(precision), placement) == given


def test_a_run_of_the_reference_does_not_compute_it_twice(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("resfeat.fidelity.parity.pictures", None)
    spec = ExtractSpec(
        sources=(str(photos / "rocket"),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        runtime=RuntimeOptions(workers=0, runtime="torch"),
    )
    assert extract(spec).parity is None


def test_images_are_embedded_while_parity_is_measured_and_none_is_committed_before(
    photos, tmp_path, monkeypatch
):
    """The reference of this run takes until the first batches are embedded, and then some time."""
    embedded, seen = threading.Event(), []
    embed, measure = Batches._embedded, fidelity.reference

    def noted(*given):
        batch = embed(*given)
        embedded.set()
        return batch

    def late(layout, *given):
        assert embedded.wait(60)
        time.sleep(0.5)
        seen.extend(layout.committed())
        return measure(layout, *given)

    monkeypatch.setattr(Batches, "_embedded", noted)
    monkeypatch.setattr(fidelity, "reference", late)
    report = extract(
        photos / "rocket", tmp_path / "out", model="cifar_resnet20", weights="random:0",
        precision="bf16", runtime="torch", workers=0, shard_size=4,
    )  # fmt: skip
    assert report.status == "finished" and not seen
    told = {json.loads(pq.read_schema(part).metadata[b"resfeat"])["parity"]["minimum"]
            for part in (tmp_path / "out" / "embeddings").iterdir()}  # fmt: skip
    assert told == {report.parity.minimum}


def test_a_worker_that_hangs_is_not_replaced_under_the_comparison(photos, tmp_path, monkeypatch):
    """The sample comes to be embedded while the worker whose decoder hangs is closed."""
    closed, hung = threading.Event(), threading.Event()
    close, measure, decode = Worker.close, fidelity.reference, worker_module.decode

    def closing(worker):
        close(worker)
        closed.set()
        time.sleep(0.5)

    def late(*given):
        expected = measure(*given)
        assert closed.wait(60)
        return expected

    def hanging(*what):
        if not hung.is_set():
            hung.set()
            time.sleep(3)
        return decode(*what)

    monkeypatch.setattr(Worker, "close", closing)
    monkeypatch.setattr(fidelity, "reference", late)
    monkeypatch.setattr(worker_module, "decode", hanging)
    monkeypatch.setattr(worker_module, "HUNG_SECONDS", 1)
    report = extract(
        photos / "rocket", tmp_path / "out", model="cifar_resnet20", weights="random:0",
        precision="bf16", runtime="torch", workers=0, cpus_per_worker=1,
    )  # fmt: skip
    assert report.status == "finished" and report.parity and hung.is_set()


def test_two_threads_never_tell_of_a_run_at_the_same_time(photos, tmp_path):
    """One takes its time to tell of the comparison, and the other would tell of progress."""
    telling, told = threading.Lock(), []

    def tell(what):
        assert telling.acquire(blocking=False)
        told.append(str(what))
        time.sleep(0.7 if "comparing" in told[-1] else 0)
        telling.release()

    extract(
        photos / "rocket", tmp_path / "out", model="cifar_resnet20", weights="random:0",
        precision="bf16", runtime="torch", workers=0, on_note=tell, on_step=tell, on_progress=tell,
    )  # fmt: skip
    assert any("comparing" in each for each in told)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 900), st.integers(1, 60))
def test_the_sample_is_spread_over_the_plan(tmp_path_factory, items, shard_size):
    layout, plan = numbered(tmp_path_factory.mktemp("plan"), items, shard_size)
    numbers = [int(item.id) for item in sample(layout, plan, SAMPLE)]
    assert len(set(numbers)) == len(numbers) >= min(items, SAMPLE)
    assert len(numbers) <= 2 * CANDIDATES * SAMPLE
    if items >= 2 * SAMPLE:
        # The first ones, which are used where all are whole, come from both halves.
        assert min(numbers[:SAMPLE]) < items / 2 <= max(numbers[:SAMPLE])


@pytest.mark.parametrize(
    ("precision", "runtime"),
    [
        ("fp32", "openvino"),
        ("bf16", "torch"),
        pytest.param("int8", "openvino", marks=pytest.mark.more),
    ],
)
def test_what_is_measured_is_what_the_run_then_gives(precision, runtime, photos, tmp_path):
    """The parity of each runtime and precision, against a whole run of the reference."""

    def run(precision, runtime):
        spec = ExtractSpec(
            sources=(str(photos / "coffee"),),
            output=str(tmp_path / f"{precision}-{runtime}"),
            model="resnet18",
            resize=36,
            crop=32,
            weights="random:0",
            precision=precision,
            runtime=RuntimeOptions(workers=0, runtime=runtime),
        )
        report = extract(spec)
        return report, vectors(rows(tmp_path / f"{precision}-{runtime}"))

    exact, expected = run("fp32", "torch")
    assert exact.parity is None
    report, given = run(precision, runtime)
    parity = report.parity
    cosines = cosine(given, expected)
    assert cosines.min() - 1e-9 <= parity.minimum <= parity.median <= 1 + 1e-6
    assert parity.images == (SAMPLE_OF_REFERENCE if precision == "fp32" else SAMPLE)
    assert cosines.min() > {"fp32": 0.999999, "bf16": 0.9999, "int8": 0.99}[precision]
    assert parity.minimum < {"fp32": 1.000001, "bf16": 0.999999, "int8": 0.99999}[precision]
