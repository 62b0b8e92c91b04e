"""Each fault of the reliability bar, done to real processes; what stays is whole, and goes on."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from command import error_of
from forked import start
from integration.test_ray import workers_of
from integration.test_resume import MORE, SHARD, title, wait_for_parts
from seams import KILL_AT_STEP, after_import
from tables import rows, vectors

from resfeat.dataset import Layout
from resfeat.sources import item_of, read

# Of a shard that is committed for the first time.
STEPS = ("written", "checked", "noted", "failures", "embeddings")
ANY_FAILURES = ["--max-error-rate", 1]
# What does not depend on who does the shards is shown by one process, and once more by Ray.
BY_ONE_PROCESS = [0, pytest.param(1, marks=MORE)]


@pytest.fixture
def few(original, tmp_path):
    """A copy of the original, to be changed at will."""
    folder = tmp_path / "few"
    shutil.copytree(original, folder, symlinks=True, copy_function=_copy)
    return folder


def _copy(source, target):
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target)


def extract(source, output, choices, *options, workers=0):
    return ["extract", source, "-o", output, *choices, "--workers", workers, "--shard-size", SHARD,
            *ANY_FAILURES, *options]  # fmt: skip


def failed(output):
    """What failed and why, without the places where it lay."""
    return rows(output, "failures").select(["id", "stage", "reason", "message"])


def last_report(output):
    return json.loads(max(Layout(output).runs.iterdir(), key=os.path.getmtime).read_text())


def the_error(done):
    """The one line of a run that failed."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Error"))
    return line


def assert_same(output, expected):
    assert rows(output).equals(rows(expected))
    assert failed(output).equals(failed(expected))
    assert not list(Layout(output).tmp.iterdir())


# A process kills itself at each step at which one is still to die; but not while it does again what
# one that died had in hand, as a shard may not cost three.
DIE_ONCE_AT_EACH_STEP = """
import os, signal

again = set()

def on_step(step):
    if again:
        return
    try:
        os.unlink(os.path.join(os.environ["DIE_AT"], step))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
"""
KNOW_WHAT_IS_DONE_AGAIN = """
from resfeat.dataset.commit import again

begin = process_shard

def process_shard(worker, task):
    if task.careful:
        again.add(task.shard)
    result = begin(worker, task)
    again.discard(task.shard)
    return result
"""


# Half way, and right behind the last one; test_commit.py has each in one process.
TWO_STEPS = ("noted", "embeddings")


@pytest.mark.ray
@pytest.mark.parametrize("steps", [TWO_STEPS, pytest.param(STEPS, marks=MORE)], ids=len)
def test_workers_killed_at_every_step_of_a_commit(
    steps, few, choices, undisturbed, command, tmp_path
):
    die_at = tmp_path / "die_at"
    die_at.mkdir()
    for step in steps:
        (die_at / step).touch()
    hooks = {
        "resfeat.dataset.commit": DIE_ONCE_AT_EACH_STEP,
        "resfeat.worker.shard": KNOW_WHAT_IS_DONE_AGAIN,
    }
    hook = after_import(hooks, tmp_path / "hook")
    output = tmp_path / "out"
    done = command(
        *extract(few, output, choices, "--shard-size", 4, workers=2),
        env={**hook, "DIE_AT": str(die_at)},
    )
    assert done.returncode == 0, done.stderr
    assert not list(die_at.iterdir())
    assert last_report(output)["engine"]["worker_deaths"] == len(steps)
    assert_same(output, undisturbed)


@pytest.mark.parametrize(
    "step", [pytest.param(n, marks=() if n in TWO_STEPS else MORE) for n in STEPS]
)
def test_the_driver_killed_at_every_step_of_a_commit(
    step, few, choices, undisturbed, command, resfeat, tmp_path
):
    hook = after_import({"resfeat.dataset.commit": KILL_AT_STEP}, tmp_path / "hook")
    output = tmp_path / "out"
    killed = command(*extract(few, output, choices), env={**hook, "KILL_AT": step})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(Layout(output).committed()) == (step == "embeddings")
    done = resfeat(*extract(few, output, choices))
    assert done.returncode == 0, done.stderr
    assert "was killed: going on" in done.stderr
    assert_same(output, undisturbed)
    assert last_report(output)["shards"] == 3 - (step == "embeddings")


# A head without a CPU, for the driver, and two machines with one each. Ends with its input.
THREE_NODES = """
import json, sys
from ray.cluster_utils import Cluster

here = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **here})
nodes = [cluster.add_node(num_cpus=1, **here) for _ in range(2)]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
print(json.dumps(raylets), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def three_nodes(short_folder, unhurried):
    """A Ray cluster: the raylets of the two machines that have room, and the environment that leads
    to it, with its token."""
    environment = {
        **unhurried,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        "RAY_TMPDIR": str(short_folder),
        # Or Ray would look for the loopback address at that of the network.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", THREE_NODES],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment,
    )  # fmt: skip
    raylets = json.loads(next(line for line in process.stdout if line.startswith("[")))
    yield list(map(psutil.Process, raylets)), environment
    everything = psutil.Process(process.pid).children(recursive=True)
    process.stdin.close()
    process.wait(timeout=60)
    for left in everything:
        if left.is_running():
            left.kill()


@pytest.fixture
def short_folder():
    """A folder for Ray: the paths of its sockets, some levels below, may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_a_node_that_is_lost_with_its_worker(collection, choices, inline, tmp_path, three_nodes):
    raylets, environment = three_nodes
    output = tmp_path / "out"
    command = extract(collection, output, choices, "--address", "auto", workers=2)
    process = start(*command, env=environment)
    wait_for_parts(process, output, 3)
    assert all(map(shard_workers, raylets))  # one each
    lost = raylets[0]
    workers = shard_workers(lost)
    lost.kill()
    for worker in workers:
        worker.kill()
    _, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained
    assert_same(output, inline)
    report = last_report(output)
    assert report["engine"]["worker_deaths"] >= 1 and report["shards"] == 16


def shard_workers(raylet):
    below = raylet.children(recursive=True)
    return [child for child in below if title(child).startswith("ray::resfeat-worker-")]


@contextmanager
def mounted(folder, size):
    """A small file system of its own at `folder`."""
    folder.mkdir()
    if not shutil.which("mount") or run(
        "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        deadline = time.monotonic() + 10
        while run("umount", folder):
            gc.collect()  # what nobody holds any more may still have a file open
            assert time.monotonic() < deadline, "a file is left open"
            time.sleep(0.1)


def remount(folder, options):
    assert run("mount", "-o", f"remount,{options}", folder) == 0


def run(*command):
    return subprocess.run([str(word) for word in command], capture_output=True).returncode


@pytest.mark.parametrize("workers", BY_ONE_PROCESS)
def test_a_disk_that_holds_no_part_is_one_line_that_names_it(
    workers, few, choices, undisturbed, command, resfeat, tmp_path
):
    """48 KiB: the plan fits, the embeddings do not; then there is room."""
    with mounted(tmp_path / "small", "48k") as disk:
        words = extract(few, disk / "out", choices, workers=workers)
        line = the_error(command(*words))
        assert str(disk / "out") in line and "No space left" in line and "resumes" in line
        layout = Layout(disk / "out")
        assert not layout.committed() and not list(layout.tmp.iterdir())
        assert layout.spec.exists()  # the plan is not made again
        remount(disk, "size=64m")
        done = resfeat(*words)
        assert done.returncode == 0, done.stderr
        assert_same(disk / "out", undisturbed)


def test_a_disk_that_fills_up_keeps_what_was_committed(
    few, choices, undisturbed, command, resfeat, tmp_path
):
    """128 KiB: some of eleven shards fit."""
    with mounted(tmp_path / "small", "128k") as disk:
        output = disk / "out"
        words = extract(few, output, choices, "--shard-size", 8)
        line = the_error(command(*words))
        assert str(output) in line and "No space left" in line and "resumes" in line
        layout = Layout(output)
        committed = layout.committed()
        assert 1 <= len(committed) < 11 and not list(layout.tmp.iterdir())
        stamps = {path: path.stat().st_mtime_ns for path in layout.embeddings.iterdir()}
        remount(disk, "size=64m")
        done = resfeat(*words)
        assert done.returncode == 0, done.stderr
        assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
        assert_same(output, undisturbed)


def test_a_disk_that_holds_no_plan_is_left_as_it_was(few, choices, command, tmp_path):
    with mounted(tmp_path / "small", "8k") as disk:
        (disk / "taken").write_bytes(b"x" * 4096)
        line = the_error(command(*extract(few, disk / "out", choices)))
        assert str(disk / "out") in line and "No space left" in line and "same command" in line
        assert [path.name for path in disk.iterdir()] == ["taken"]


# The command by one whom the modes of files stop, as they do not stop root; and so what it starts.
WITHOUT_RIGHTS = """
import ctypes
from resfeat.cli import main

DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2
BOUNDING_SET_DROP = 24
libc = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
libc.capget(header, sets)
for capability in (DAC_OVERRIDE, DAC_READ_SEARCH):
    libc.prctl(BOUNDING_SET_DROP, capability, 0, 0, 0)
    for each in range(3):  # effective, permitted, inheritable
        sets[each] &= ~(1 << capability)
libc.capset(header, sets)
main()
"""


@pytest.fixture
def without_rights(tmp_path, command):
    if os.geteuid():
        return command
    if sys.platform != "linux":
        pytest.skip("root may read everything, and cannot give that up")
    script = tmp_path / "without_rights.py"
    script.write_text(WITHOUT_RIGHTS)
    return partial(command, script=script)


@pytest.mark.parametrize("workers", BY_ONE_PROCESS)
def test_a_photograph_that_may_not_be_read(
    workers, few, choices, tmp_path, without_rights, resfeat
):
    hidden = next(few.glob("*.png"))
    hidden.chmod(0)
    output = tmp_path / "out"
    done = without_rights(*extract(few, output, choices, workers=workers))
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in rows(output, "failures").to_pylist() if row["id"] == hidden.name)
    assert (row["stage"], row["reason"]) == ("read", "permission")

    hidden.chmod(0o644)
    done = resfeat(*extract(few, output, choices, "--retry-failed", workers=workers))
    assert done.returncode == 0, done.stderr
    assert hidden.name in rows(output)["id"].to_pylist()
    assert hidden.name not in failed(output)["id"].to_pylist()


@pytest.mark.parametrize(
    "where",
    [
        "a folder in it",
        *(pytest.param(each, marks=MORE) for each in ("the source itself", "the folder around it")),
    ],
)
def test_a_source_that_may_not_be_read(where, few, choices, tmp_path, without_rights, resfeat):
    source = few.parent / "around" / "few"
    source.parent.mkdir()
    few.rename(source)
    deep = source / "deep"
    deep.mkdir()
    folder = {"the source itself": source, "a folder in it": deep}.get(where, source.parent)
    folder.chmod(0)
    output = tmp_path / "out"
    done = without_rights(*extract(source, output, choices))
    folder.chmod(0o755)
    line = error_of(done.stderr)
    assert done.returncode == (2 if folder == source.parent else 1)
    assert str(folder) in line and ("readable" in line or "check the path" in line)
    assert not output.exists()
    done = resfeat(*extract(source, output, choices))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("mode", "made"),
    [
        (0o555, False),
        pytest.param(0, True, marks=MORE),
        pytest.param(0o555, True, marks=MORE),
        pytest.param(0, False, marks=MORE),
    ],
)
def test_an_output_that_may_not_be_written(
    mode, made, few, choices, tmp_path, without_rights, resfeat
):
    """The folder of the dataset, or the one that it is to be made in."""
    folder = tmp_path / "closed"
    folder.mkdir()
    output = folder if made else folder / "out"
    folder.chmod(mode)
    done = without_rights(*extract(few, output, choices))
    folder.chmod(0o755)
    line = the_error(done)
    assert str(output) in line and "Permission denied" in line and "can be written" in line
    assert not list(folder.iterdir())
    done = resfeat(*extract(few, output, choices))
    assert done.returncode == 0, done.stderr


def test_a_file_system_that_is_read_only(few, choices, command, resfeat, tmp_path):
    hook = after_import({"resfeat.dataset.commit": KILL_AT_STEP}, tmp_path / "hook")
    with mounted(tmp_path / "disk", "64m") as disk:
        new, begun = disk / "new", disk / "begun"
        killed = command(*extract(few, begun, choices), env={**hook, "KILL_AT": "embeddings"})
        assert killed.returncode == -signal.SIGKILL
        before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
        remount(disk, "ro")
        for output in (new, begun):
            line = the_error(command(*extract(few, output, choices)))
            assert str(output) in line and "Read-only file system" in line
            assert "can be written" in line
        assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before
        remount(disk, "rw")
        assert not new.exists()
        for output in (new, begun):
            done = resfeat(*extract(few, output, choices))
            assert done.returncode == 0, done.stderr
        assert_same(begun, new)


def test_files_that_vanish_or_change_after_they_were_listed(
    few, choices, undisturbed, command, resfeat, tmp_path
):
    hook = after_import({"resfeat.dataset.commit": KILL_AT_STEP}, tmp_path / "hook")
    output = tmp_path / "out"
    killed = command(*extract(few, output, choices), env={**hook, "KILL_AT": "written"})
    assert killed.returncode == -signal.SIGKILL
    assert not Layout(output).committed()
    gone, changed, other = sorted(few.glob("*.png"))[::7][:3]
    gone.unlink()
    shutil.copy(other, changed)
    os.utime(changed, ns=(0, 1_700_000_000_123_456_000))

    done = resfeat(*extract(few, output, choices))
    assert done.returncode == 0, done.stderr
    assert "Changed since they were listed: 1 images" in done.stdout
    assert last_report(output)["changed"] == 1
    (row,) = (row for row in rows(output, "failures").to_pylist() if row["id"] == gone.name)
    assert (row["stage"], row["reason"]) == ("read", "not_found")

    now, before = rows(output), rows(undisturbed)
    assert set(now["id"].to_pylist()) == set(before["id"].to_pylist()) - {gone.name}
    here = {row["id"]: row for row in now.to_pylist()}
    there = {row["id"]: row for row in before.to_pylist()}
    assert here[changed.name]["size"] == changed.stat().st_size != there[changed.name]["size"]
    assert here[changed.name]["mtime"].timestamp() == pytest.approx(1_700_000_000.123456, abs=1e-6)
    assert np.allclose(
        here[changed.name]["embedding"], there[other.name]["embedding"], rtol=1e-3, atol=1e-4
    )
    assert not np.allclose(
        here[changed.name]["embedding"], there[changed.name]["embedding"], rtol=1e-3, atol=1e-4
    )
    del here[changed.name], there[changed.name], there[gone.name]
    assert here == there


@pytest.mark.parametrize("left", ["more", "less", "other"])
def test_a_file_that_is_written_to_while_it_is_read(left, tmp_path, monkeypatch):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"before")
    os.utime(path, (1, 1))
    fstat = os.fstat

    def and_write(descriptor):
        status = fstat(descriptor)
        if status.st_mtime == 1:  # the first time
            path.write_bytes(
                {"more": b"before and after", "less": b"bef", "other": b"after."}[left]
            )
        return status

    monkeypatch.setattr(os, "fstat", and_write)
    failure = read(item_of(str(path)))
    assert (failure.stage, failure.reason) == ("read", "io_error")
    assert "written to while it was read" in failure.message
    assert read(item_of(str(path)))[0] == path.read_bytes()


# The source is moved away by the worker that comes to read this many files from it.
MOVE_AWAY = """
import itertools, os, threading

count = itertools.count(1)
truly_read = read

def read(item):
    by_worker = threading.current_thread().name.startswith("load")
    if by_worker and next(count) == int(os.environ["AFTER"]):
        os.rename(os.environ["SOURCE"], os.environ["SOURCE"] + " elsewhere")
    return truly_read(item)
"""


@pytest.mark.parametrize(
    ("after", "workers"),
    [(75, 0), *(pytest.param(*each, marks=MORE) for each in ((65, 0), (65, 1), (75, 1)))],
)
def test_a_source_that_goes_away_during_the_run(
    after, workers, few, choices, undisturbed, command, resfeat, tmp_path
):
    """Between two shards, and in the middle of one."""
    output = tmp_path / "out"
    hook = after_import({"resfeat.sources.directory": MOVE_AWAY}, tmp_path / "hook")
    line = the_error(
        command(
            *extract(few, output, choices, workers=workers),
            env={**hook, "SOURCE": str(few), "AFTER": str(after)},
        )
    )
    assert f"source {few} is gone" in line and "resumes" in line
    layout = Layout(output)
    assert not list(layout.tmp.iterdir())
    assert len(layout.committed()) < 3
    expected = set(failed(undisturbed)["id"].to_pylist())
    if layout.with_failures():
        assert set(failed(output)["id"].to_pylist()) <= expected

    Path(f"{few} elsewhere").rename(few)
    done = resfeat(*extract(few, output, choices, workers=workers))
    assert done.returncode == 0, done.stderr
    assert_same(output, undisturbed)


@pytest.mark.parametrize("workers", BY_ONE_PROCESS)
def test_two_writers_that_begin_together(workers, collection, choices, inline, unhurried, tmp_path):
    output = tmp_path / "out"
    words = extract(collection, output, choices, workers=workers)
    both = [start(*words, env=unhurried) for _ in range(2)]
    ended = {process: process.communicate(timeout=300) for process in both}
    first, second = sorted(both, key=lambda process: process.returncode)
    assert (first.returncode, second.returncode) == (0, 1), ended
    line = error_of(ended[second][1])
    assert f"is being written by process {first.pid} on {socket.gethostname()}" in line
    assert_same(output, inline)


@pytest.mark.ray
@pytest.mark.parametrize("program", [pytest.param("", marks=MORE), "import ray"])
def test_ray_listens_to_this_machine_alone_and_no_secret_is_written_down(
    program, collection, choices, unhurried, tmp_path, short_folder
):
    """Secrets of the environment are looked for in all that the run and its Ray have written."""
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DATABASE_PASSWORD", "HF_TOKEN")
    secrets = {name: f"planted-{number}-{os.urandom(8).hex()}" for number, name in enumerate(names)}
    output = tmp_path / "out"
    script = tmp_path / "program.py"
    script.write_text(f"{program}\nfrom resfeat.cli import main\nmain()\n")
    words = extract(collection, output, choices, "--log-json", workers=1)
    env = {**unhurried, **secrets, "RAY_TMPDIR": str(short_folder)}
    process = start(*words, env=env, script=script)
    wait_for_parts(process, output, 1)
    assert workers_of(process)
    driver = psutil.Process(process.pid)
    listening = {
        (each.name(), *connection.laddr)
        for each in [driver, *driver.children(recursive=True)]
        for connection in each.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    process.terminate()
    written = dict(zip(("stdout", "stderr"), map(str.encode, process.communicate(60)), strict=True))
    assert process.returncode == 128 + signal.SIGTERM, written

    assert any("gcs_server" in name for name, *_ in listening), listening
    outside = {
        each for each in listening if each[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    }
    assert not outside

    for path in [*short_folder.rglob("*"), *output.rglob("*")]:
        if path.is_file():
            written[str(path)] = path.read_bytes()
    # Ray's own words, and our rows, are among what is searched.
    assert {"raylet.out", "part-00000.parquet"} <= {Path(name).name for name in written}
    assert not [
        (place, name)
        for place, content in written.items()
        for name, secret in secrets.items()
        if secret.encode() in content
    ]


SMALL_DEVICE = """
# A device that holds so many images; and after so many batches, none, as if others had filled it.
import os

build = start

def start(*args, **options):
    runtime, batches = build(*args, **options), []
    embed = runtime.embed

    def limited(pixels):
        import torch

        batches.append(len(pixels))
        if len(batches) > int(os.environ["FULL_AFTER"]) or len(pixels) > int(os.environ["HOLDS"]):
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return embed(pixels)

    runtime.embed = limited
    return runtime
"""


FAILING_GPU = """
# A GPU that fails in the first process that has embedded three batches, for good; the next process
# can use it, unless FAILS says "always". What CUDA says is turned into an error of ours as there.
import os
from pathlib import Path

build = start

def start(*args, **options):
    runtime, batches = build(*args, **options), []
    embed, place = runtime.embed, Path(os.environ["FAILED"])

    def failing(pixels):
        import torch

        from resfeat.runtimes.cuda import device_errors

        batches.append(len(pixels))
        own = str(os.getpid())
        if len(batches) > 3 and (not place.exists() or os.environ["FAILS"] == "always"):
            place.write_text(own)
        if len(batches) > 3 and place.read_text() == own:
            with device_errors():
                raise torch.AcceleratorError("CUDA error: unspecified launch failure\\nmore of it")
        return embed(pixels)

    runtime.embed = failing
    return runtime
"""


@pytest.mark.more
@pytest.mark.ray
def test_a_worker_whose_gpu_fails_is_replaced_or_the_run_says_that_it_resumes(
    few, undisturbed, choices, command, tmp_path
):
    def run(fails):
        hook = after_import({"resfeat.runtimes": FAILING_GPU}, tmp_path / "hook")
        env = hook | {"FAILS": fails, "FAILED": str(tmp_path / fails)}
        output = tmp_path / f"out-{fails}"
        options = ["--batch-size", 8, "--log-json"]
        return command(*extract(few, output, choices, *options, workers=1), env=env), output

    once, output = run("once")
    assert once.returncode == 0, once.stderr
    assert json.loads(once.stdout.splitlines()[-1])["engine"]["worker_deaths"] == 1
    assert_same(output, undisturbed)

    always, output = run("always")
    line = the_error(always)
    assert "3 workers died while doing shard 0: the GPU of" in line
    assert "unspecified launch failure" in line and "it resumes" in line
    again = command(*extract(few, output, choices, "--batch-size", 8))
    assert again.returncode == 0, again.stderr
    assert_same(output, undisturbed)


@pytest.mark.parametrize("workers", BY_ONE_PROCESS)
def test_a_device_without_memory_gets_smaller_batches_and_the_report_says_so(
    workers, few, undisturbed, choices, command, tmp_path
):
    def run(holds, full_after):
        hook = after_import({"resfeat.runtimes": SMALL_DEVICE}, tmp_path / "hook")
        output = tmp_path / f"{holds}-{full_after}"
        done = command("extract", few, "-o", output, *choices, *ANY_FAILURES, "--workers", workers,
                       "--batch-size", 8, "--runtime", "torch", "--log-json",
                       env=hook | {"HOLDS": str(holds), "FULL_AFTER": str(full_after)})  # fmt: skip
        assert "Traceback" not in done.stderr
        return done, output

    halved, output = run(3, 10**6)
    assert halved.returncode == 0, halved.stderr
    report = json.loads(halved.stdout.splitlines()[-1])
    assert any("held 2 images at once and not the 8" in note for note in report["notes"])
    assert rows(output)["id"].equals(rows(undisturbed)["id"])
    assert np.allclose(vectors(rows(output)), vectors(rows(undisturbed)), rtol=1e-4, atol=1e-6)

    filled, output = run(8, 6)
    assert filled.returncode == 0, filled.stderr
    report = json.loads(filled.stdout.splitlines()[-1])
    assert report["embedded"] > 0 and report["reasons"]["out_of_memory"] > 8
    assert report["embedded"] + report["failed"] == report["items"]

    nothing, output = run(0, 10**6)
    assert nothing.returncode == 0, nothing.stderr
    report = json.loads(nothing.stdout.splitlines()[-1])
    assert report["embedded"] == 0 and report["reasons"]["out_of_memory"] == len(rows(undisturbed))
