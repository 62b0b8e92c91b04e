"""resfeat bench: it measures what is there, and refuses what cannot be measured."""

import itertools
import json
import re
import time

import pytest
from broken import write_broken
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from resfeat.cli import main
from resfeat.reporting import bench as module
from resfeat.sources import reading
from resfeat.sources.item import Item
from resfeat.worker import Placement

MODEL = ("--model", "cifar_resnet20", "--images", "40")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.2)


def test_every_stage_is_measured(collection):
    done = CliRunner().invoke(main, ["bench", str(collection), *MODEL, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert 40 <= told["images"] < 80
    assert 0 <= told["failed"] < 12
    assert min(told[stage] for stage in ("read", "decode", "forward", "write", "whole")) > 0
    assert 0 <= told["waited"] <= 1


class SlowPart(module.Part):
    def commit(self, ids):
        time.sleep(1)
        super().commit(ids)


@pytest.mark.parametrize(
    ("stage", "seconds", "named"),
    [
        ("read", 0.1, "reading"),
        ("decode", 0.1, "decoding"),
        ("forward", 0.5, "the model"),
        ("Part", 0, "writing"),
    ],
)
def test_the_stage_that_is_slow_is_named(stage, seconds, named, photos, monkeypatch):
    """Each is made slow in turn, to a few images a second, of which some are enough."""
    place = reading if stage == "read" else module
    truly = getattr(place, stage)

    def slow(*args):
        time.sleep(seconds)
        return truly(*args)

    monkeypatch.setattr(place, stage, SlowPart if stage == "Part" else slow)
    done = CliRunner().invoke(main, ["bench", str(photos / "coffee"), *MODEL, "--images", "8"])
    assert done.exit_code == 0, done.output
    assert f"The limit is {named}: " in done.stdout


@pytest.mark.parametrize(
    ("cpus", "whole", "told"),
    [(2, 1700, "6 such workers"), (2, 9000, None), (16, 1700, None)],
)
def test_how_many_workers_keep_a_gpu_busy(cpus, whole, told):
    """As the report has it: busy for four fifths of its time. None where one does, or where many
    would not have the cores that this one has."""
    place = Placement(runtime="torch", device="cuda", cpus=cpus, batch_size=256, gpus=1.0)
    rates = {"read": 9000.0, "decode": 1800.0, "forward": 11_000.0, "write": 60_000.0}
    sentence = module._sentence(rates, whole, place, "bf16")
    assert ("workers would" in sentence) == bool(told) and (told or "") in sentence


def test_the_table(photos):
    done = CliRunner().invoke(main, ["bench", str(photos), *MODEL, "--runtime", "torch"])
    assert done.exit_code == 0, done.output
    rows = re.findall(
        r"^(read|decode|forward|write|all of it) +[\d,.]+ +[\d,.]+$", done.stdout, re.M
    )
    assert rows == ["read", "decode", "forward", "write", "all of it"]
    assert "fp32 on torch" in done.stdout and "The limit is" in done.stdout


def test_what_cannot_be_measured_is_one_line(tmp_path):
    for folder in ("none", "broken"):
        (tmp_path / folder).mkdir()
    write_broken(tmp_path / "broken")
    for folder, says in (
        ("nowhere", "does not exist"),
        ("none", "no images there"),
        ("broken", "can be decoded: are these images?"),
    ):
        done = CliRunner().invoke(main, ["bench", str(tmp_path / folder), *MODEL])
        assert done.exit_code == 2
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


@given(st.integers(1, 500), st.integers(1, 60))
def test_the_sample_is_spread_over_any_listing(count, wanted):
    chosen = module._spread((Item(str(n), "", 0, 0) for n in range(count)), wanted)
    numbers = [int(item.id) for item in chosen]
    assert min(count, wanted) <= len(numbers) < 2 * wanted or len(numbers) == count == 1
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    assert numbers[0] == 0 and len(steps) <= 1
    for step in steps:
        assert count - numbers[-1] <= step
