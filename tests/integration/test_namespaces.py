"""Three machines, each a network namespace: a head for the driver, and two with a worker each."""

import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from integration.test_faults import last_report
from integration.test_resume import title
from machines import machines, why_none
from seams import after_import
from small import QUICK
from tables import rows

import resfeat
from resfeat.dataset import Layout

pytestmark = [pytest.mark.more, pytest.mark.ray]

# Who did which shard, and a hold that ends when its file goes, so that nothing depends on how fast
# the machines are.
NOTED = """
import os, pathlib, time

begin = process_shard

def process_shard(worker, task):
    notes, machine = pathlib.Path(os.environ["NOTES"]), os.environ["MACHINE"]
    while (notes / f"hold-{machine}").exists() and list(notes.glob(f"{machine}-*")):
        time.sleep(0.05)
    result = begin(worker, task)
    (notes / f"{machine}-{task.shard}").touch()
    return result
"""
# Ray gives a machine up after 5 checks that fail; by default that takes a minute.
CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
}
PIPELINE = Path(__file__).parents[2] / "pipelines" / "ray_job.sh"
LIMIT = 300  # seconds, for whatever is waited for


class Three:
    """A Ray on machines: "head", which has room for drivers alone, and others with one core."""

    def __init__(self, made, folder, env):
        self.made, self.folder, self.env = made, folder, env
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.addresses = {name: made.add(name) for name in ("head", "a", "b")}
        self.address = f"{self.addresses['head']}:6379"

    def start(self, name, prefix=(), **env):
        """Have a machine join, behind a prefix of its command. On a busy machine Ray gives up after
        30 s."""
        words = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start",
                 f"--node-ip-address={self.addresses[name]}", "--disable-usage-stats",
                 f"--temp-dir={self.folder / name}", "--object-store-memory=80000000"]  # fmt: skip
        if name == "head":
            words += ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0"]
        else:
            words += [f"--address={self.address}", "--num-cpus=1"]
        about = {**self.env, "MACHINE": name, **env}
        for _ in range(3):
            with open(self.folder / f"{name}.log", "w") as log:
                if not self.made.start(name, words, about, log).wait(timeout=LIMIT):
                    return
            self.stop(name)
        raise AssertionError((self.folder / f"{name}.log").read_text())

    def stop(self, name):
        """End all that runs on a machine, in order if it can."""
        left = self.processes(name)
        for process in left:
            process.terminate()
        _, left = psutil.wait_procs(left, timeout=10)
        for process in left:
            process.kill()

    def processes(self, name):
        return [psutil.Process(pid) for pid in self.made.pids(name) if psutil.pid_exists(pid)]

    def workers(self, name):
        return [
            each for each in self.processes(name) if title(each).startswith("ray::resfeat-worker-")
        ]

    def hold(self, name):
        """Have a machine do no more than a shard, with the others in hand."""
        (self.notes / f"hold-{name}").touch()

    def let_go(self, name):
        (self.notes / f"hold-{name}").unlink()

    def done_by(self, name):
        return [int(path.name.rpartition("-")[2]) for path in self.notes.glob(f"{name}-*")]

    def drive(self, *words, env=None):
        """The command, under way on the head."""
        log = open(self.folder / "driver.log", "w+")  # noqa: SIM115
        words = [sys.executable, "-m", "resfeat", *words, "--address", self.address]
        process = self.made.start("head", words, {**self.env, "MACHINE": "head"} | (env or {}), log)
        process.log = log
        return process


def wait_until(happens):
    deadline = time.monotonic() + LIMIT
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def end_of(process):
    """What it wrote, once it has ended."""
    process.wait(timeout=LIMIT)
    process.log.seek(0)
    return process.log.read()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The head and the first machine up; the second one joins when a test has it join."""
    if why := why_none():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # the paths of Ray's sockets have to be short
    hook = after_import({"resfeat.worker.shard": NOTED}, folder / "hook")
    environment = {
        **hook, **CHECKS,
        "PYTHONPATH": os.pathsep.join([hook["PYTHONPATH"], str(Path(resfeat.__file__).parents[1])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "NOTES": str(folder / "notes"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }  # fmt: skip
    with machines() as made:
        ray = Three(made, folder, environment)
        try:
            ray.start("head")
            ray.start("a")
            yield ray
        finally:
            for name in ray.addresses:
                ray.stop(name)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Ray has workers import from where the driver stands: not where this resfeat is."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def fresh_notes(three):
    for note in three.notes.iterdir():
        note.unlink()


def test_one_that_joins_late_gets_work_and_one_that_is_cut_off_costs_time(
    three, some, serial, tmp_path
):
    """Of two workers that are asked for the first begins alone. Then both are held with shards in
    hand, one is cut off, and the other does all that is left."""
    output = tmp_path / "out"
    three.hold("a")
    three.hold("b")
    process = three.drive("extract", some, "-o", output, *QUICK, "--workers", 2, "--log-json")
    wait_until(lambda: three.done_by("a") or process.poll() is not None)
    assert process.poll() is None, end_of(process)
    three.start("b")
    wait_until(lambda: three.done_by("b"))
    time.sleep(2)  # until it has the next in hand
    three.made.cut("b")
    cut = time.monotonic()
    three.let_go("a")
    told = end_of(process)
    assert process.returncode == 0, told
    print(f"{time.monotonic() - cut:.0f} s from the cut to the end")
    assert rows(output).equals(rows(serial))
    assert len(three.done_by("a")) + len(three.done_by("b")) == len(Layout(output).committed())
    engine = last_report(output)["engine"]
    assert engine["worker_deaths"] == 1 and engine["lost_seconds"] > 1
    three.made.mend("b")
    three.stop("b")


def test_a_driver_that_is_killed_leaves_no_worker_on_a_cluster_that_stays(
    three, some, serial, tmp_path
):
    output = tmp_path / "out"
    three.hold("a")
    words = "extract", some, "-o", output, *QUICK, "--workers", 1
    process = three.drive(*words)
    wait_until(lambda: three.done_by("a") or process.poll() is not None)
    assert three.workers("a"), end_of(process)
    time.sleep(2)  # until it holds
    committed = Layout(output).committed()
    process.kill()
    process.wait()
    killed = time.monotonic()
    wait_until(lambda: not three.workers("a"))
    print(f"{time.monotonic() - killed:.0f} s from the end of the driver to that of its worker")
    assert Layout(output).committed() == committed
    three.let_go("a")
    process = three.drive(*words)
    told = end_of(process)
    assert process.returncode == 0 and "was killed: going on" in told, told
    assert rows(output).equals(rows(serial))


MOUNTED = {
    "the source": "mount -t tmpfs none {source}",
    "the output": "mount -t tmpfs none {output}",
    "a right to write": "mount --bind {output} {output} && mount -o remount,bind,ro {output}",
}
OTHERS = {
    "our version": ('"0', '"9'),
    "resfeat": ("\nimport", "\nraise ModuleNotFoundError('No module named resfeat')\nimport"),
}
TOLD = {
    "the source": "does not see {source}",
    "the output": "does not see {output}",
    "a right to write": "may not write to {output}",
    "our version": "a worker runs resfeat 9",
    "resfeat": "No module named resfeat; is resfeat installed",
}


@pytest.mark.parametrize("missing", TOLD)
def test_a_machine_that_lacks_something_is_one_line_before_it_does_anything(
    missing, three, some, tmp_path
):
    """While the other one has it all, and works."""
    output = tmp_path / "out"
    output.mkdir()
    prefix, environment = [], {}
    if missing in MOUNTED:
        mount = MOUNTED[missing].format(source=some, output=output)
        prefix = ["sh", "-c", f'{mount} && exec "$0" "$@"']
    else:
        other = tmp_path / "other"
        shutil.copytree(Path(resfeat.__file__).parent, other / "resfeat")
        module = other / "resfeat" / "__init__.py"
        module.write_text(module.read_text().replace(*OTHERS[missing], 1))
        environment["PYTHONPATH"] = os.pathsep.join([str(other), three.env["PYTHONPATH"]])
    three.hold("a")
    three.start("b", prefix, **environment)
    try:
        process = three.drive("extract", some, "-o", output, *QUICK, "--workers", 2)
        told = end_of(process)
    finally:
        three.stop("b")
    assert process.returncode == 1 and "Traceback" not in told, told
    (line,) = (line for line in told.splitlines() if line.startswith("Error"))
    assert TOLD[missing].format(source=some, output=output) in line
    if missing in MOUNTED:
        assert f"({three.addresses['b']})" in line
    assert not three.done_by("b") and not Layout(output).with_failures()


def test_a_driver_without_the_token_or_with_another_is_told_soon(three, some, tmp_path):
    for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "x" * 32}):
        process = three.drive("extract", some, "-o", tmp_path / "out", *QUICK, env=token)
        told = end_of(process)
        assert process.returncode == 1 and "it wants a token: set RAY_AUTH_MODE" in told, told
        assert not Layout(tmp_path / "out").committed()


def test_a_job_is_submitted_followed_stopped_and_resumed(three, some, serial, tmp_path):
    output, log = tmp_path / "out", (tmp_path / "log").open("w+")

    def run(*words, job=""):
        about = {"RAY_API_SERVER_ADDRESS": f"http://{three.addresses['head']}:8265", "JOB_ID": job}
        process = three.made.start("head", words, {**three.env, **about}, log)
        process.log = log
        return process

    words = [PIPELINE, some, "-o", output, *QUICK, "--workers", 1]
    three.hold("a")
    submitted = run(*words, job="first")
    wait_until(lambda: three.done_by("a") or submitted.poll() is not None)
    assert submitted.poll() is None, end_of(submitted)
    stopping = run("ray", "job", "stop", "first")
    wait_until(lambda: "stopping: " in (tmp_path / "log").read_text())
    three.let_go("a")
    told = end_of(stopping) + end_of(submitted)
    assert "images (" in told and "Stopped, the same command goes on" in told, told
    assert submitted.returncode == 143
    before = len(Layout(output).committed())
    assert 1 <= before < len(Layout(serial).committed())
    resumed = run(*words, job="second")
    told = end_of(resumed)
    assert resumed.returncode == 0, told
    assert rows(output).equals(rows(serial))
    log.close()
