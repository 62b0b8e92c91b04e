"""What is named as the limit, from made-up busy seconds."""

import pytest

from resfeat.reporting import Report, limits


@pytest.mark.parametrize(
    ("stages", "limit"),
    [
        ({}, None),
        ({"read": 1.0}, None),
        ({"embed": 10.0, "wait": 0.1, "decode": 9.0}, "embed"),
        ({"embed": 10.0, "wait": 2.4, "decode": 60.0}, "embed"),
        ({"embed": 10.0, "wait": 2.6, "decode": 60.0}, "decode"),
        ({"embed": 10.0, "wait": 30.0, "decode": 60.0, "read": 5.0, "write": 1.0}, "decode"),
        # Twelve threads read and eight decode: reading's 70 s are less of what it has.
        ({"embed": 10.0, "wait": 30.0, "decode": 60.0, "read": 70.0}, "decode"),
        ({"embed": 10.0, "wait": 30.0, "decode": 20.0, "read": 200.0}, "read"),
        ({"embed": 10.0, "wait": 30.0, "decode": 20.0, "write": 39.0}, "write"),
    ],
)
def test_the_limit(stages, limit):
    assert limits.bottleneck(stages, cpus=8, reads_ahead=4) == limit


def test_the_share_that_the_model_waited():
    assert limits.waited({}) == 0
    assert limits.waited({"wait": 1.0, "embed": 3.0}) == 0.25


def verdict(stages, device, precision):
    return Report(
        run_id="", status="finished", output="", precision=precision, items=0, embedded=0, failed=0,
        reasons={}, stages=stages, engine={"device": device, "cpus": 8, "reads_ahead": 4},
    ).verdict  # fmt: skip


def test_the_sentence_names_the_limit_and_what_helps():
    told = verdict({"embed": 10.0, "wait": 30.0, "decode": 60.0}, "cuda", "bf16")
    assert told.startswith("limited by: decode (the model waited 75% of its time)")
    assert "more CPU cores" in told
    busy = {"embed": 10.0, "wait": 0.0}
    assert "a GPU" in verdict(busy, "cpu", "fp32")
    assert "int8" in verdict(busy, "cpu", "fp32")
    assert "int8" not in verdict(busy, "cpu", "int8")
    assert "bf16" in verdict(busy, "cuda", "fp32")
    assert verdict({}, "cpu", "fp32") is None
