"""The Ray engine: dead workers, placement, and errors that come from a worker."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from datasets import rows
from integration.test_resume import start, wait_for_parts

import resfeat
from resfeat.backbones.ours import IMAGENET
from resfeat.engines import ray as ray_engine
from resfeat.errors import ResfeatError, UsageError
from resfeat.spec import Identity, RuntimeOptions

IDENTITY = Identity(model="resnet18", weights_digest="", preprocessing=IMAGENET)


def workers_of(process):
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if (child.cmdline() or [""])[0].startswith("ray::RayWorker")
    ]


def test_a_killed_worker_costs_only_its_shards(collection, choices, inline, tmp_path):
    output = tmp_path / "out"
    process = start("extract", collection, "-o", output, *choices, "--workers", 2,
                    "--shard-size", 32, "--log-json")  # fmt: skip
    for parts in (2, 6):
        wait_for_parts(process, output, parts)
        workers_of(process)[0].kill()
    told, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    assert rows(output).equals(rows(inline))
    *progress, report = map(json.loads, told.splitlines())
    assert report["event"] == "report" and report["shards"] == 16
    # One that was still starting is started again by Ray, and no death of a worker at work.
    assert 1 <= report["engine"]["worker_deaths"] <= 2
    assert all(line["done"] <= line["total"] == 512 for line in progress)


def test_no_code_of_the_folder_that_one_stands_in_is_run(photos, checkpoint, tmp_path):
    for module in ("torch", "numpy", "pyarrow", "openvino", "simplejpeg", "click", "queue"):
        (tmp_path / f"{module}.py").write_text("open('ran', 'w'); raise SystemExit(__name__)")
    command = [Path(sys.executable).with_name("resfeat"), "extract", photos / "chelsea", "-o",
               "out", "--workers", "1", "--model", "resnet18", "--weights", checkpoint]  # fmt: skip
    # Below `uv run`, which Ray looks for among its parents, it would also be packed and sent.
    (tmp_path / "run").write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
    done = subprocess.run(
        ["uv", "run", *command], executable=sys.executable, cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def cluster():
    """A Ray of 4 CPUs and 2 GPUs, by its own account; placement needs no more."""
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("options", "workers", "cpus", "asked", "device"),
    [
        ({}, 2, 2, {"num_cpus": 2.0, "num_gpus": 1.0}, "cuda"),
        ({"gpus_per_worker": 0.5}, 4, 1, {"num_cpus": 1.0, "num_gpus": 0.5}, "cuda"),
        ({"gpus_per_worker": 0}, 1, 4, {"num_cpus": 4.0, "num_gpus": 0.0}, "cpu"),
        ({"gpus_per_worker": 0, "workers": 2}, 2, 2, {"num_cpus": 2.0, "num_gpus": 0.0}, "cpu"),
        ({"gpus_per_worker": 0, "workers": 8}, 8, 1, {"num_cpus": 0.5, "num_gpus": 0.0}, "cpu"),
        ({"gpus_per_worker": 0, "cpus_per_worker": 1}, 4, 1,
         {"num_cpus": 1.0, "num_gpus": 0.0}, "cpu"),
        ({"runtime": "openvino"}, 1, 4, {"num_cpus": 4.0, "num_gpus": 0.0}, "cpu"),
    ],
)  # fmt: skip
def test_placement(cluster, options, workers, cpus, asked, device):
    given = ray_engine._place(RuntimeOptions(**options), IDENTITY, shards=100)
    assert given[:2] == (workers, asked)
    assert (given[2].cpus, given[2].device) == (cpus, device)
    runtime = {"cpu": "openvino", "cuda": "torch"}[device]
    assert (given[2].runtime, given[2].batch_size) == (runtime, {"cpu": 2, "cuda": 256}[device])


def test_int8_keeps_to_the_cpu_where_nothing_is_said_of_gpus(cluster):
    identity = replace(IDENTITY, precision="int8")
    assert ray_engine._place(RuntimeOptions(), identity, shards=100)[2].device == "cpu"
    with pytest.raises(UsageError, match="--precision int8 is for CPUs"):
        ray_engine._place(RuntimeOptions(gpus_per_worker=1), identity, shards=100)


def test_no_more_workers_than_shards(cluster):
    assert ray_engine._place(RuntimeOptions(), IDENTITY, shards=1)[0] == 1


@pytest.mark.parametrize(
    "options", [{"cpus_per_worker": 5}, {"workers": 3}, {"workers": 3, "cpus_per_worker": 2}]
)
def test_what_the_machine_cannot_hold_is_refused(cluster, options):
    with pytest.raises(ResfeatError, match="give"):
        ray_engine._place(RuntimeOptions(**options), IDENTITY, shards=100)


def test_a_worker_that_dies_every_time_ends_the_run(cluster, collection, tmp_path, monkeypatch):
    """Real actors, each killed as soon as it is given work."""
    spec = resfeat.ExtractSpec(
        sources=(str(collection),),
        output=str(tmp_path / "out"),
        model="resnet18",
        weights="random:0",
        runtime=RuntimeOptions(workers=1, gpus_per_worker=0),
    )
    hand_out = ray_engine._Pool.hand_out

    def and_kill(pool):
        given = len(pool.waiting)
        hand_out(pool)
        if len(pool.waiting) < given:
            time.sleep(0.5)
            ray.kill(pool._members[0].actor, no_restart=False)

    monkeypatch.setattr(ray_engine._Pool, "hand_out", and_kill)
    with pytest.raises(ResfeatError, match="3 workers died while doing shard"):
        resfeat.extract(spec)
    assert ray.is_initialized()  # it was ours, and still is
    (report,) = (tmp_path / "out" / "_resfeat" / "runs").iterdir()
    assert json.loads(report.read_text())["status"] == "failed"


def test_an_idle_worker_that_died_is_ready_when_work_comes(cluster, photos, tmp_path, monkeypatch):
    """Three shards for two workers; the idle one is killed, and then the busy one."""
    spec = resfeat.ExtractSpec(
        sources=(str(photos / "chelsea"), str(photos / "rocket")),
        output=str(tmp_path / "out"),
        model="resnet18",
        weights="random:0",
        shard_size=64,
        runtime=RuntimeOptions(workers=2, gpus_per_worker=0, cpus_per_worker=1),
    )
    hand_out = ray_engine._Pool.hand_out
    killed = []

    def to_one_only(pool):
        ready = [member for member in pool._members if member.live]
        if len(ready) == 2 and not killed:
            idle, busy = ready
            ray.kill(idle.actor, no_restart=False)
            pool._members = [busy]
            hand_out(pool)
            pool._members = [idle, busy]
            time.sleep(1)
            ray.kill(busy.actor, no_restart=False)
            killed.extend([idle, busy])
        elif killed:
            hand_out(pool)

    monkeypatch.setattr(ray_engine._Pool, "hand_out", to_one_only)
    report = resfeat.extract(spec)
    assert killed and report.status == "finished"
    assert report.embedded == report.items == 111


def test_a_stale_cluster_file_is_no_reason_to_wait(photos, tmp_path, resfeat):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    started = time.monotonic()
    done = resfeat("extract", photos, "-o", tmp_path / "out", "--model", "resnet18", "--weights",
                   "random:0", "--address", "auto", env={"RAY_TMPDIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - started < 20
    assert "cannot join Ray at auto" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_gpu_is_said_and_nothing_is_left(photos, tmp_path, resfeat):
    for workers in (0, 1):
        done = resfeat("extract", photos, "-o", tmp_path / "out", "--model", "resnet18",
                       "--weights", "random:0", "--gpus-per-worker", 1, "--workers", workers,
                       env={"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert "a GPU was asked for" in line and "--gpus-per-worker 0" in line
        assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_listens(photos, tmp_path, resfeat):
    started = time.monotonic()
    done = resfeat("extract", photos, "-o", tmp_path / "out", "--model", "resnet18",
                   "--weights", "random:0", "--address", "127.0.0.1:1")  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - started < 20
    assert "cannot join Ray at 127.0.0.1:1" in done.stderr
    assert not (tmp_path / "out").exists()
