"""The Ray engine: dead workers, placement, and errors that come from a worker."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
import torch
from command import end_ray, error_of
from forked import start
from integration.test_resume import title, wait_for_parts
from seams import after_import
from small import QUICK
from tables import rows

import resfeat
from resfeat import engines
from resfeat.backbones.ours import IMAGENET
from resfeat.backbones.weights import resolve
from resfeat.dataset import Layout
from resfeat.engines import actor as ray_actor
from resfeat.engines import placement
from resfeat.engines import ray as ray_engine
from resfeat.engines.pool import Pool
from resfeat.errors import ResfeatError, UsageError
from resfeat.plan import Shard
from resfeat.spec import FeatureSpec, Identity, RuntimeOptions
from resfeat.worker import SHARDS_IN_HAND, Job, Placement, ShardResult, Task
from resfeat.worker.worker import LONG_SECONDS, Worker

pytestmark = pytest.mark.ray
IDENTITY = Identity(model="resnet18", weights_digest="", preprocessing=IMAGENET)


def workers_of(process):
    """The processes of Ray workers below one."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if title(child).startswith("ray::resfeat-worker-")]


@pytest.mark.more
def test_a_killed_worker_costs_only_its_shards(collection, choices, inline, unhurried, tmp_path):
    output = tmp_path / "out"
    process = start("extract", collection, "-o", output, *choices, "--workers", 2,
                    "--shard-size", 32, "--log-json", env=unhurried)  # fmt: skip
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
    told = [line for line in progress if line["event"] == "progress"]
    assert told and all(line["done"] <= line["total"] == 512 for line in told)


# Run after "resfeat.worker.shard": the worker that begins one first ends none until the
# others have done all that it has not begun.
SLOW = """
import contextlib, os, pathlib, time

begin = process_shard

def process_shard(worker, task):
    notes, parts = pathlib.Path(os.environ["NOTES"]), pathlib.Path(os.environ["PARTS"])
    with contextlib.suppress(FileExistsError):
        os.symlink(str(os.getpid()), notes / "who")
    if os.readlink(notes / "who") == str(os.getpid()):
        (notes / f"shard-{task.shard}").touch()
        while len([*parts.glob("part-*"), *notes.glob("shard-*")]) < int(os.environ["SHARDS"]):
            time.sleep(0.05)
    return begin(worker, task)
"""


@pytest.mark.more
def test_a_slow_worker_is_left_with_the_shards_that_it_began_with(some, serial, command, tmp_path):
    """However slow: all others are done before its first."""
    output, notes = tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    about = {"NOTES": str(notes), "PARTS": str(output / "embeddings"), "SHARDS": "9"}
    hook = after_import({"resfeat.worker.shard": SLOW}, tmp_path / "hook")
    done = command("extract", some, "-o", output, *QUICK, "--workers", 2, env=hook | about)
    assert done.returncode == 0, done.stderr
    assert len(Layout(serial).committed()) == 9
    assert 1 <= len(list(notes.glob("shard-*"))) <= SHARDS_IN_HAND
    assert rows(output).equals(rows(serial))


# Run after these modules: the worker that begins a shard first takes 3 s for an image until all are
# there; who commits is noted.
STUCK = {
    "resfeat.worker.shard": """
import contextlib, os, pathlib

begin = process_shard

def process_shard(worker, task):
    notes = pathlib.Path(os.environ["NOTES"])
    with contextlib.suppress(FileExistsError):
        os.symlink(str(os.getpid()), notes / "who")
    if os.readlink(notes / "who") == str(os.getpid()):
        (notes / f"shard-{task.shard}").touch()
    return begin(worker, task)
""",
    "resfeat.decoding.decode": """
import os, pathlib, time

without = _decode

def _decode(data, *rest):
    notes, parts = pathlib.Path(os.environ["NOTES"]), pathlib.Path(os.environ["PARTS"])
    end = time.monotonic() + 3
    if os.readlink(notes / "who") == str(os.getpid()):
        while len([*parts.glob("part-*")]) < int(os.environ["SHARDS"]) and time.monotonic() < end:
            time.sleep(0.05)
    return without(data, *rest)
""",
    "resfeat.dataset.commit": """
import os, pathlib

def on_step(step):
    with open(pathlib.Path(os.environ["NOTES"]) / "commits", "a") as commits:
        commits.write(f"{step} {os.getpid()}\\n")
""",
}


@pytest.mark.more
def test_what_a_slow_worker_has_begun_is_taken_over_by_one_that_has_nothing_left(
    some, serial, command, tmp_path
):
    """It does none of its shards, which another commits once."""
    output, notes = tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    about = {"NOTES": str(notes), "PARTS": str(output / "embeddings"), "SHARDS": "9"}
    hook = after_import(STUCK, tmp_path / "hook")
    done = command("extract", some, "-o", output, *QUICK, "--workers", 2, env=hook | about)
    assert done.returncode == 0, done.stderr
    begun = len(list(notes.glob("shard-*")))
    (report,) = (output / "_resfeat" / "runs").iterdir()
    engine = json.loads(report.read_text())["engine"]
    assert (engine["taken_over"], engine["worker_deaths"]) == (begun, 0) and begun
    assert f"Shards that a quicker worker took over: {begun}" in done.stdout
    steps = [line.split() for line in (notes / "commits").read_text().splitlines()]
    by = [pid for step, pid in steps if step == "embeddings"]
    assert len(by) == 9 and os.readlink(notes / "who") not in by
    assert rows(output).equals(rows(serial))
    assert not list(Layout(output).tmp.iterdir())


def test_torch_takes_no_more_cores_than_the_worker_has(monkeypatch):
    """It is imported before Ray says how many these are."""
    before = torch.get_num_threads()
    placement = Placement(runtime="torch", device="cpu", cpus=before + 2, batch_size=1)
    there = object.__new__(ray_actor.RayWorker)
    there.__dict__ |= {"_lost": False, "_lock": threading.Lock(), "_worker": None,
                       "_job": SimpleNamespace(output="", share="", created="", in_sight=()),
                       "_placement": placement}  # fmt: skip
    monkeypatch.setattr(ray_actor.ray, "get", lambda network: network)
    monkeypatch.setattr(ray_actor, "check_sight", lambda *asked: None)
    monkeypatch.setattr(ray_actor, "Worker", lambda *asked: torch.get_num_threads())
    try:
        assert there._ready_worker([None]) == before + 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("seconds", "lets_go"), [(1, True), (LONG_SECONDS + 1, False)])
def test_a_worker_whose_decoder_may_hang_lets_go_of_nothing(seconds, lets_go):
    """It has to find that out: the next to decode that image would hang, too."""
    actor, worker, shard = (
        object.__new__(ray_engine.RayWorker),
        object.__new__(Worker),
        Shard(0, "", 0, 10),
    )
    worker.decoding_since, worker.dropped = {1: time.monotonic() - seconds}, set()
    actor._worker = worker
    actor.let_go(shard)
    assert (shard in worker.dropped) == lets_go


def test_no_code_of_the_folder_that_one_stands_in_is_run(photos, tmp_path):
    for module in ("torch", "numpy", "pyarrow", "openvino", "simplejpeg", "click", "queue"):
        (tmp_path / f"{module}.py").write_text("open('ran', 'w'); raise SystemExit(__name__)")
    command = [Path(sys.executable).with_name("resfeat"), "extract", photos / "chelsea", "-o",
               "out", "--workers", "1", "--model", "cifar_resnet20",
               "--weights", "random:0"]  # fmt: skip
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
    end_ray()
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
    given = placement.place(RuntimeOptions(**options), IDENTITY, shards=100)
    assert given[:2] == (workers, asked)
    assert (given[2].cpus, given[2].device) == (cpus, device)
    runtime = {"cpu": "openvino", "cuda": "torch"}[device]
    assert (given[2].runtime, given[2].batch_size) == (runtime, {"cpu": 2, "cuda": 256}[device])


def test_int8_keeps_to_the_cpu_where_nothing_is_said_of_gpus(cluster):
    identity = replace(IDENTITY, precision="int8")
    assert placement.place(RuntimeOptions(), identity, shards=100)[2].device == "cpu"
    with pytest.raises(UsageError, match="--precision int8 is for CPUs"):
        placement.place(RuntimeOptions(gpus_per_worker=1), identity, shards=100)


def test_no_more_workers_than_shards(cluster):
    assert placement.place(RuntimeOptions(), IDENTITY, shards=1)[0] == 1


@pytest.mark.parametrize(
    "options", [{"cpus_per_worker": 5}, {"workers": 17}, {"workers": 3, "cpus_per_worker": 2}]
)
def test_what_the_machine_cannot_hold_is_refused(cluster, options):
    with pytest.raises(ResfeatError, match="give"):
        placement.place(RuntimeOptions(**options), IDENTITY, shards=100)


@pytest.mark.more
def test_a_worker_that_dies_every_time_ends_the_run(cluster, collection, tmp_path, monkeypatch):
    """Real actors, each killed as soon as it is given work, by the system as when memory is short:
    Ray would end what a worker has started first, which a worker may live to tell."""
    spec = resfeat.ExtractSpec(
        sources=(str(collection),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        runtime=RuntimeOptions(workers=1, gpus_per_worker=0),
    )
    hand_out = Pool.hand_out

    def and_kill(pool):
        for given in hand_out(pool):
            yield given
            time.sleep(0.5)
            for worker in workers_of(psutil.Process()):
                worker.kill()

    monkeypatch.setattr(Pool, "hand_out", and_kill)
    with pytest.raises(ResfeatError, match="3 workers died while doing shard"):
        resfeat.extract(spec)
    assert ray.is_initialized()  # it was ours, and still is
    (report,) = (tmp_path / "out" / "_resfeat" / "runs").iterdir()
    assert json.loads(report.read_text())["status"] == "failed"


@pytest.mark.more
def test_an_idle_worker_that_died_is_ready_when_work_comes(cluster, photos, tmp_path, monkeypatch):
    """Three shards for two workers. The idle one is killed, which is noticed though it has no work
    and costs no shard; when it is back, the busy one is killed."""
    spec = resfeat.ExtractSpec(
        sources=(str(photos / "chelsea"), str(photos / "rocket")),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        shard_size=64,
        runtime=RuntimeOptions(workers=2, gpus_per_worker=0, cpus_per_worker=1),
    )
    hand_out, died = Pool.hand_out, Pool.died
    idle, deaths = [], []

    def in_turn(pool):
        if len(pool.live) == 2 and not idle:
            idle.append(pool.live[0])
            ray.kill(idle[0].actor, no_restart=False)
        elif deaths == [[]] and len(pool.live) == 2:
            (busy,) = set(pool.live) - set(idle)
            pool.members = [busy]
            yield from hand_out(pool)
            pool.members = [*idle, busy]
            ray.kill(busy.actor, no_restart=False)
        elif len(deaths) == 2:
            yield from hand_out(pool)

    def noted(pool, member, *reason, **flags):
        if member.live:
            deaths.append(list(member.in_hand))
        died(pool, member, *reason, **flags)

    monkeypatch.setattr(Pool, "hand_out", in_turn)
    monkeypatch.setattr(Pool, "died", noted)
    given_up = time.monotonic() + 120
    report = resfeat.extract(spec, stopping=lambda: time.monotonic() > given_up)
    assert [len(shards) for shards in deaths] == [0, 2]
    assert report.status == "finished"
    assert report.engine["worker_deaths"] == 2
    assert report.embedded == report.items == 111


@contextmanager
def engine_of(workers, step=print):
    """An engine for workers that only pretend to work."""
    weights = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0"))
    job = Job(output="", share="", sources=(), reads_ahead=1, identity=weights.identity,
              dims=weights.dims, with_label=False)  # fmt: skip
    options = RuntimeOptions(workers=workers, gpus_per_worker=0)
    with (
        engines.prepare(options, step) as ours,
        engines.start(options, job, weights, 4, ours) as engine,
    ):
        yield engine


def tasks(count):
    return [Task(Shard(number, "", 0, 1)) for number in range(count)]


def test_nobody_waits_for_a_worker_that_is_not_up(cluster, tmp_path, monkeypatch):
    """The second of two comes up first, and embeds the sample. The first dies with shards in hand
    and does not come back; the second, idle by then, does them."""

    class Obedient(ray_engine.RayWorker):
        """A worker that starts, and finishes shards, when a file of its name says so."""

        def _await(self, what):
            while not (tmp_path / f"{what}-{ray.get_runtime_context().get_actor_id()}").exists():
                time.sleep(0.05)

        def start(self, network):
            self._await("start")
            return resfeat.__version__, str(os.getpid())

        def process(self, task, network):
            self._await("finish")
            return ShardResult(task.shard.number, 1, 0, 0, 0, 1, {})

        def embed(self, pictures, network):
            return np.zeros((len(pictures), 1), np.float32)

        def progress(self):
            return {}

    def let(member, what):
        (tmp_path / f"{what}-{member.actor._actor_id.hex()}").touch()

    def lose_the_first(*counts):
        name = tmp_path / f"start-{first.actor._actor_id.hex()}"
        if name.exists() and first.in_hand and not second.in_hand:
            name.unlink()
            ray.kill(first.actor, no_restart=False)

    monkeypatch.setattr(ray_engine, "RayWorker", Obedient)
    steps, given_up = [], time.monotonic() + 120

    def stopping():
        return time.monotonic() > given_up

    with engine_of(2, steps.append) as engine:
        first, second = engine._pool.members
        let(second, "start")
        assert engine.embed([np.zeros((4, 4, 3), np.uint8)], stopping).shape == (1, 1)
        assert steps[0] == "waiting for the first of 2 workers" and not first.live
        let(first, "start")
        while not first.live:
            assert not stopping()
            list(engine._collect())
        let(second, "finish")
        results = list(engine.run(tasks(4), lose_the_first, stopping))
        assert sorted(result.shard for result in results) == [0, 1, 2, 3]
        assert not first.live and engine.description["worker_deaths"] == 1


def test_a_connection_that_breaks_costs_no_work_and_is_no_death(cluster, tmp_path, monkeypatch):
    """The connections to a worker are cut while it has two shards in hand. It finishes them after
    it was found to be there, which Ray could not say; neither is begun a second time."""

    class Slow(ray_engine.RayWorker):
        def _ready_worker(self, network):
            # What this process is to do in place of a shard.
            ray_actor.process_shard = self._work
            (tmp_path / "pid").write_text(str(os.getpid()))

        def _work(self, worker, task):
            (tmp_path / f"begun-{task.shard}-{uuid.uuid4()}").touch()
            while not (tmp_path / "finish").exists():
                time.sleep(0.05)
            return ShardResult(task.shard.number, 1, 0, 0, 0, 1, {})

    def begun():
        return sorted(path.name.split("-")[1] for path in tmp_path.glob("begun-*"))

    def cut_once(*counts):
        if not happened and len(begun()) == 2:
            cut_connections(int((tmp_path / "pid").read_text()))
            happened.append("cut")
        elif happened == ["cut"] and only.silent:
            happened.append("silent")
        elif happened == ["cut", "silent"] and not only.silent:
            happened.append("there")
            (tmp_path / "finish").touch()

    monkeypatch.setattr(ray_engine, "RayWorker", Slow)
    happened, given_up = [], time.monotonic() + 60
    with engine_of(1) as engine:
        (only,) = engine._pool.members
        results = list(engine.run(tasks(3), cut_once, lambda: time.monotonic() > given_up))
    assert happened == ["cut", "silent", "there"]
    assert sorted(result.shard for result in results) == [0, 1, 2]
    assert begun() == ["0", "1", "2"] and engine.description["worker_deaths"] == 0


def cut_connections(pid):
    """Break this process's TCP connections to another one, as a network may."""
    ports = {
        each.laddr.port
        for each in psutil.Process(pid).net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN
    }
    for each in psutil.Process().net_connections(kind="tcp"):
        if each.raddr and each.raddr.port in ports:
            with socket.socket(fileno=os.dup(each.fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def test_a_stale_cluster_file_is_no_reason_to_wait(photos, tmp_path, command):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    started = time.monotonic()
    done = command("extract", photos, "-o", tmp_path / "out", "--model", "cifar_resnet20",
                   "--weights", "random:0", "--address", "auto",
                   env={"RAY_TMPDIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - started < 20
    assert "cannot join Ray at auto" in done.stderr
    assert not Layout(tmp_path / "out").committed()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.more)])
def test_a_missing_gpu_is_said(workers, photos, tmp_path, command):
    done = command("extract", photos, "-o", tmp_path / "out", "--model", "cifar_resnet20",
                   "--weights", "random:0", "--gpus-per-worker", 1, "--workers", workers,
                   env={"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 1
    line = error_of(done.stderr)
    assert "a GPU was asked for" in line and "--gpus-per-worker 0" in line
    assert not Layout(tmp_path / "out").committed()


# A shard that is in hand until somebody says "go", a cluster of a head for the driver and one
# machine, and three times: drained, removed, and another in its place.
PREEMPTED = """
import json, sys, time
from pathlib import Path

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from resfeat import engines
from resfeat.backbones.weights import resolve
from resfeat.dataset import Layout
from resfeat.engines import ray as engine
from resfeat.plan import Shard
from resfeat.spec import FeatureSpec, RuntimeOptions
from resfeat.worker import Job, ShardResult, Task

folder = Path(sys.argv[1])


class Slow(engine.RayWorker):
    def start(self, network):
        return engine.__version__, self._process

    def process(self, task, network):
        (folder / ray.get_runtime_context().get_node_id()).touch()
        while not (folder / "go").exists():
            time.sleep(0.1)
        return ShardResult(task.shard.number, 1, 0, 0, 0, 1, {"careful": task.careful})

    def progress(self):
        return {}


def preempt(*counts):
    node = nodes[-1]
    if not (folder / node.node_id).exists():
        return
    if len(nodes) == 4:
        (folder / "go").touch()
        return
    why = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(time.time() * 1000) + 1000
    GcsClient(address=machines.address).drain_node(node.node_id, why, "spot", deadline)
    time.sleep(1.5)
    machines.remove_node(node, allow_graceful=False)
    nodes.append(machines.add_node(num_cpus=1))


machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
weights = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0"))
job = Job(output="", share="", sources=(), reads_ahead=1, identity=weights.identity,
          dims=weights.dims, with_label=False)
engine.RayWorker = Slow
options = RuntimeOptions(workers=1, cpus_per_worker=1, address=machines.address)
nodes = [machines.add_node(num_cpus=1)]
with engines.prepare(options) as ours, engines.start(options, job, weights, 2, ours) as running:
    tasks = [Task(Shard(number, "", 0, 1)) for number in range(2)]
    results = list(running.run(tasks, preempt, lambda: False))
    told = {
        "shards": sorted(each.shard for each in results),
        "careful": any(each.seconds["careful"] for each in results),
        "worker_deaths": running.description["worker_deaths"],
    }
machines.shutdown()
print(json.dumps(told))
"""


@pytest.mark.slow
def test_preempted_machines_cost_their_shard_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PREEMPTED, tmp_path], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"shards": [0, 1], "careful": False, "worker_deaths": 3}


def test_an_address_where_nobody_listens(photos, tmp_path, command):
    started = time.monotonic()
    done = command("extract", photos, "-o", tmp_path / "out", "--model", "cifar_resnet20",
                   "--weights", "random:0", "--address", "127.0.0.1:1")  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - started < 20
    assert "cannot join Ray at 127.0.0.1:1" in done.stderr
    assert not Layout(tmp_path / "out").committed()
