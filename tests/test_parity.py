"""Parity with fp32 on torch: what is measured, and what it stops."""

import numpy as np
import pytest
from datasets import rows, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from resfeat import ExtractSpec, RuntimeOptions, extract
from resfeat.dataset import Layout
from resfeat.errors import ResfeatError
from resfeat.fidelity.parity import SAMPLE, SAMPLE_OF_REFERENCE, Parity, check, cosine
from resfeat.fidelity.sample import CANDIDATES, sample
from resfeat.plan import write_plan
from resfeat.sources.item import Item
from resfeat.spec import Identity, Preprocessing

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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 900), st.integers(1, 60))
def test_the_sample_is_spread_over_the_plan(tmp_path_factory, items, shard_size):
    layout = Layout(tmp_path_factory.mktemp("plan"))
    layout.plan.mkdir(parents=True)
    layout.tmp.mkdir(parents=True)
    listing = (Item(f"{n:05d}", f"file:///{n}", 1, 1) for n in range(items))
    plan = write_plan(layout.plan, layout.tmp, listing, shard_size)
    numbers = [int(item.id) for item in sample(layout, plan, SAMPLE)]
    assert len(set(numbers)) == len(numbers) >= min(items, SAMPLE)
    assert len(numbers) <= 2 * CANDIDATES * SAMPLE
    if items >= 2 * SAMPLE:
        # The first ones, which are used where all are whole, come from both halves.
        assert min(numbers[:SAMPLE]) < items / 2 <= max(numbers[:SAMPLE])


def test_what_is_measured_is_what_the_run_then_gives(photos, tmp_path):
    """The parity of each runtime and precision, against a whole run of the reference."""

    def run(precision, runtime):
        spec = ExtractSpec(
            sources=(str(photos / "coffee"),),
            output=str(tmp_path / f"{precision}-{runtime}"),
            model="resnet18",
            weights="random:0",
            precision=precision,
            runtime=RuntimeOptions(workers=0, runtime=runtime),
        )
        report = extract(spec)
        return report, vectors(rows(tmp_path / f"{precision}-{runtime}"))

    exact, expected = run("fp32", "torch")
    assert exact.parity is None
    for precision, runtime in ("bf16", "torch"), ("fp32", "openvino"), ("int8", "openvino"):
        report, given = run(precision, runtime)
        parity = report.parity
        cosines = cosine(given, expected)
        assert cosines.min() - 1e-9 <= parity.minimum <= parity.median <= 1 + 1e-6
        assert parity.images == (SAMPLE_OF_REFERENCE if precision == "fp32" else SAMPLE)
        assert cosines.min() > {"fp32": 0.999999, "bf16": 0.9999, "int8": 0.99}[precision]
        assert (parity.minimum < 0.99999) == (precision == "int8")
