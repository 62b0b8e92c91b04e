"""What is named as the limit, from made-up busy seconds; and of a time limit."""

import re
import time

import numpy as np
import pytest
from invented import write_dataset

from resfeat.reporting import Report, Tally, Watch, limits
from resfeat.reporting.course import Course
from resfeat.worker import ShardResult


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


def verdict(stages, device, precision, seconds=1.0, **engine):
    known = {"device": device, "cpus": 8, "reads_ahead": 4, "workers": 1, "gpus": 0.0, **engine}
    return Report(
        run_id="", status="finished", output="", precision=precision, items=0, embedded=0, failed=0,
        reasons={}, stages=stages, engine=known, seconds=seconds,
    ).verdict  # fmt: skip


def test_the_sentence_names_the_limit_and_what_helps():
    told = verdict({"embed": 10.0, "wait": 30.0, "decode": 60.0}, "cuda", "bf16", cpus=2)
    assert told.startswith("limited by: decode (the model waited 75% of its time)")
    assert told.endswith("faster with more CPU cores for each GPU")
    busy = {"embed": 10.0, "wait": 0.0}
    assert "a GPU" in verdict(busy, "cpu", "fp32")
    assert "int8" in verdict(busy, "cpu", "fp32")
    assert "int8" not in verdict(busy, "cpu", "int8")
    assert "bf16" in verdict(busy, "cuda", "fp32")
    assert verdict({}, "cpu", "fp32") is None


def test_of_a_run_of_a_moment_it_is_said_that_it_was_too_short():
    busy = {"embed": 0.1, "wait": 0.0}
    assert verdict(busy, "cpu", "fp32", seconds=0.9).startswith("too short to tell")
    assert verdict(busy, "cpu", "fp32", seconds=1.0).startswith("limited by: embed")


def committed(worker, images, took):
    return ShardResult(0, images, 0, 0, 0, 16, {}, worker=worker, took=took)


def test_the_speed_of_each_worker_over_time():
    course = Course()
    course.add(committed(2, 100, 10.5), 110.0)  # alone, in a half of the time
    course.add(committed(1, 40, 5.0), 105.0)
    course.add(committed(1, 60, 15.0), 120.0)
    course.add(committed(3, 50, 5.0), 120.0)  # came late, and is not slow
    rates = course.rates(100.0, 120.0)
    assert list(rates) == ["1", "2", "3"]
    assert rates["1"] == [8.0] * 10 + [4.0] * 30
    assert rates["2"] == [10.0] * 20 + [0.0] * 20
    assert rates["3"] == [0.0] * 30 + [10.0] * 10
    assert course.rates(120.0, 120.0) == {}
    course = Course()
    for _ in range(2):  # at once, within a span
        course.add(committed(1, 5, 0.0), 10.01)
    assert sum(course.rates(10.0, 14.0)["1"]) * 0.1 == pytest.approx(10, abs=0.01)


def test_the_report_has_the_course_of_the_run(tmp_path):
    dataset = write_dataset(tmp_path / "out", np.ones((4, 2), np.float32))
    shards = list(dataset.record.plan.shards.values())
    tally = Tally(shards, shards, Watch(), 0.0)
    tally.engine = {"device": "cpu", "batch_size": 16, "cpus": 1, "reads_ahead": 4}
    tally.show(0, 0, 1, None)
    time.sleep(0.05)
    tally.add(ShardResult(0, 3, 1, 0, 0, 16, {}, worker=7, took=9.0))
    report = tally.report(dataset, None)
    (rates,) = report.course.values()
    assert list(report.course) == ["7"] and len(set(rates)) == 1
    assert rates[0] == pytest.approx(report.images_per_second, rel=0.05)


def test_a_gpu_that_one_process_does_not_feed_wants_more_workers_and_not_more_cores():
    told = verdict({"embed": 10.0, "wait": 30.0, "decode": 60.0}, "cuda", "bf16", cpus=16, gpus=1.0)
    assert told.endswith("more workers to a GPU, since one decodes on hardly more than 2 cores")


# Eight workers of 2 cores on one GPU, for 100 s: their 16 forward threads can be busy for 1600 s.
EIGHT = {"workers": 8, "gpus": 0.125, "cpus": 2, "reads_ahead": 4}
BUSY = {"embed": 1500.0, "wait": 100.0}


@pytest.mark.parametrize(
    ("stages", "engine", "enough"),
    [
        # 300 s of decoding are 1.5 workers' cores; at four fifths of their time, those of 1.9.
        (BUSY | {"decode": 300.0}, EIGHT, 2),
        # 320 s are just the 2 x 2 cores' 400 s at four fifths, and one second more is too much.
        (BUSY | {"decode": 320.0}, EIGHT, 2),
        (BUSY | {"decode": 321.0}, EIGHT, 3),
        (BUSY | {"decode": 1.0}, EIGHT, 1),
        # Seven workers decode for at most 1120 s, so 1121 takes all eight.
        (BUSY | {"decode": 1120.0}, EIGHT, 7),
        (BUSY | {"decode": 1121.0}, EIGHT, None),
        # Six threads read: 1441 s are more than the 480 s each of three workers.
        (BUSY | {"decode": 1.0, "read": 1441.0}, EIGHT, 4),
        # Two threads write.
        (BUSY | {"decode": 1.0, "write": 161.0}, EIGHT, 2),
        # Each of four GPUs needs one.
        (BUSY | {"decode": 1.0}, EIGHT | {"gpus": 0.5}, 4),
        # The model waited: more than a fifth of 1000 s.
        ({"embed": 799.0, "wait": 201.0, "decode": 300.0}, EIGHT, None),
        # Nobody shared a GPU, or had one.
        (BUSY | {"decode": 300.0}, EIGHT | {"gpus": 1.0}, None),
        (BUSY | {"decode": 300.0}, EIGHT | {"gpus": 0.0}, None),
        ({}, EIGHT, None),
    ],
)
def test_how_many_workers_would_have_kept_the_gpus_as_busy(stages, engine, enough):
    assert limits.enough(stages, engine, 100.0) == enough


def test_the_sentence_says_that_fewer_workers_would_do():
    told = verdict(BUSY | {"decode": 300.0}, "cuda", "bf16", 100.0, **EIGHT)
    waited = "the model waited 6% of its time, and 2 of 8 workers would do"
    assert told == f"limited by: embed ({waited}); faster with more GPUs"
    assert "would do" not in verdict(BUSY | {"decode": 1121.0}, "cuda", "bf16", 100.0, **EIGHT)


@pytest.mark.parametrize(
    ("device", "says"),
    [("cpu", "--batch-size 32 saves finding that out"), ("cuda", "fewer workers to a GPU, or")],
)
def test_what_is_said_of_memory_that_was_short(device, says):
    notes = []
    tally = Tally([], [], Watch(note=notes.append), 0.0)
    tally.engine = {"device": device, "batch_size": 128}
    for fits in (128, 32, 32):
        tally.add(ShardResult(0, 1, 0, 0, 0, fits, {}))
    (note,) = notes
    assert "held 32 images at once and not the 128 of a batch" in note and says in note


def test_a_time_limit_shorter_than_a_shard_is_told_once_and_early(monkeypatch):
    notes = []
    tally = Tally([], [], Watch(note=notes.append), 0.0)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    tally.show(1, 0, 1, 1e9)  # without a limit
    for end in ("", "Unknown", "0", f"{time.time() - 60:.0f}", f"{time.time() + 7200:.0f}"):
        monkeypatch.setenv("SLURM_JOB_END_TIME", end)
        tally.show(2, 0, 1, 3600.0)
        tally.show(3, 0, 1, None)
    assert notes == []
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + 630:.0f}")
    for soonest in (7200.0, 7300.0):
        tally.show(4, 0, 1, soonest)
    (note,) = notes
    told = r"the first takes 120\.0 more minutes, and 10\.\d are left: give the job more --time"
    assert re.search(told, note)
    done = Tally([], [], Watch(note=notes.append), 0.0)
    done.engine = {"device": "cpu", "batch_size": 16}
    done.add(ShardResult(0, 1, 0, 0, 0, 16, {}))
    done.show(4, 0, 1, 7200.0)  # at least one shard is
    assert len(notes) == 1


def test_that_bits_depend_on_the_place_in_a_batch_is_said_once():
    notes = []
    tally = Tally([], [], Watch(note=notes.append), 0.0)
    tally.engine = {"device": "cuda", "batch_size": 256}
    for steady in (True, False, False):
        tally.add(ShardResult(0, 1, 0, 0, 0, 256, {}, steady=steady))
    (note,) = notes
    assert "the last bits of an embedding depend on its place in a batch" in note
