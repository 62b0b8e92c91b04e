"""Several runs that share one dataset: real processes, killed, started twice, and kept apart."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command import error_of
from forked import start
from seams import after_import
from small import write_pictures
from tables import rows

from resfeat.dataset import Layout
from resfeat.dataset import holding as held
from resfeat.dataset.writer import HeldError, Writer
from resfeat.errors import Stopped, UsageError
from resfeat.plan import Partition
from resfeat.storage import locate

IMAGES, SHARD = 60, 5
SHARDS = 13  # with one image that is none
FEATURES = ["--model", "cifar_resnet20", "--weights", "random:1", "--decode", "pillow"]
PLACED = ["--workers", 0, "--runtime", "torch", "--shard-size", SHARD, "--batch-size", 4]
OPTIONS = [*FEATURES, *PLACED, "--max-error-rate", 0.5]

# Counts commits: a line for each, with the process. After FREE of them, and with the drafts of the
# next one written, it stands still for as long as GATE is there. KILL_AT: where it kills itself.
COUNTED = """
import itertools, os, signal, time

count = itertools.count()

def on_step(step):
    if step == "written" and next(count) >= int(os.environ.get("FREE", "0")):
        while os.path.exists(os.environ["GATE"]):
            time.sleep(0.02)
    if step == "embeddings":
        with open(os.environ["COMMITS"], "a") as file:
            file.write(f"{os.getpid()}\\n")
    if step == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
"""

# Whoever lists takes so long that the others see it, and first waits until so many are there.
SLOW = """
import os, time

made = _make_plan

def _make_plan(request, layout, weights):
    while len(layout.shares()) <= int(os.environ.get("BESIDE", "0")):  # "all" is one, too
        time.sleep(0.02)
    time.sleep(float(os.environ.get("SLOW", "0")))
    return made(request, layout, weights)
"""

# The one that lists is killed with its draft written, before that is in place.
KILLED_LISTING = """
import os, signal

def sha256(draft):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def pictures(once) -> Path:
    """Small pictures, and a file that is none. Not to be changed."""

    def write(folder):
        write_pictures(folder, IMAGES)
        (folder / "a" / "broken.jpg").write_bytes(b"not an image")

    return once("pictures-to-share", write)


@pytest.fixture(scope="module")
def single(pictures, extracted) -> Path:
    """The pictures, extracted by one run. Not to be changed."""
    output = extracted("single", pictures, *OPTIONS)
    assert len(Layout(output).committed()) == SHARDS
    return output


def behind_a_gate(tmp_path) -> tuple[Path, dict[str, str]]:
    """A file, and the environment of processes that count their commits and, as long as it is
    there, stand still on their way."""
    gate = tmp_path / "gate"
    gate.touch()
    sources = {"resfeat.dataset.commit": COUNTED, "resfeat.run.planning": SLOW}
    counts = {"GATE": str(gate), "COMMITS": str(tmp_path / "commits")}
    return gate, {**after_import(sources, tmp_path / "hook"), **counts}


@pytest.fixture
def gate(tmp_path):
    return behind_a_gate(tmp_path)


@pytest.fixture
def gated(gate):
    return gate[1]


def commits(env) -> list[int]:
    """The processes that committed something, once for each time."""
    path = Path(env["COMMITS"])
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def ended(processes):
    """Whatever comes, none of these is left."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def until(condition, processes=(), seconds=120):
    """Wait for something that processes do; none of them may end before."""
    given_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < given_up, "it does not come"
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def files(output) -> dict[str, bytes]:
    """The rows as they lie there: parts by name."""
    return {
        f"{kind}/{path.name}": path.read_bytes()
        for kind in ("embeddings", "failures")
        for path in (locate(output) / kind).iterdir()
    }


def everything(output: Path) -> dict[str, bytes | None]:
    """All that is below a folder, but for the drafts of those that write."""
    return {
        str(path.relative_to(output)): path.read_bytes() if path.is_file() else None
        for path in output.rglob("*")
        if not (path.is_file() and "_resfeat/tmp/" in str(path))
    }


def status_of(resfeat, output, env=None) -> dict:
    return json.loads(resfeat("status", output, "--json", env=env).stdout)


def refused(done, code=1) -> str:
    """The line of a run that was refused."""
    assert done.returncode == code, done.stdout + done.stderr
    return error_of(done.stderr)


def named(process, which) -> str:
    return f"is being written by partition {which}, process {process.pid} on "


def test_four_partitions_two_of_which_are_killed_and_one_is_started_twice(
    pictures, single, gate, gated, resfeat, tmp_path
):
    output = tmp_path / "out"
    command = ["extract", pictures, "-o", output, *OPTIONS]

    def partition(number, **more):
        return start(*command, "--partition", f"{number}/4", env={**gated, **more})

    beside = {"FREE": "1", "SLOW": "1", "BESIDE": "4"}
    begun = [partition(n, **beside) for n in (1, 2, 3)]
    begun.append(partition(4, **beside, KILL_AT="noted"))
    first, second, third, fourth = begun
    with ended(begun):
        until(lambda: {first.pid, second.pid, third.pid} <= set(commits(gated)), begun[:3])
        assert fourth.wait(60) == -signal.SIGKILL
        assert Counter(commits(gated)) == {each.pid: 1 for each in begun[:3]}

        # Nobody else comes in, whichever way, and nothing is changed by one who tries.
        before = everything(output)
        assert named(second, "2/4") in refused(resfeat(*command, "--partition", "2/4"))
        assert "is being written by partition " in refused(resfeat(*command))
        assert "is being written by partition " in refused(resfeat(*command, "--partition", "4/5"))
        after = everything(output)
        assert after == before

        told = status_of(resfeat, output)
        assert not told["complete"] and told["shards_committed"] == 3
        shares = {each["partition"]: each for each in told["partitions"]}
        assert list(shares) == ["1/4", "2/4", "3/4", "4/4"]
        assert [each["shards_left"] for each in shares.values()] == [3, 2, 2, 3]
        assert all(each["started"] for each in shares.values())
        assert f"process {first.pid} on " in shares["1/4"]["writer"]
        assert shares["4/4"]["writer"] is None
        assert "4/4 3 shards left, nobody at it" in resfeat("status", output).stdout

        third.kill()
        assert third.wait(60) == -signal.SIGKILL
        again = [partition(n, FREE="9") for n in (3, 4)]
        with ended(again):
            gate[0].unlink()
            runs = {1: first, 2: second, 3: again[0], 4: again[1]}
            told = {number: run.communicate(timeout=120) for number, run in runs.items()}
    assert [run.returncode for run in runs.values()] == [0, 0, 0, 0], told

    # Each shard once, by the partition that it belongs to, and the bytes of one run.
    counts = Counter(commits(gated))
    assert counts.total() == SHARDS
    assert {number: counts[run.pid] for number, run in runs.items()} == {1: 4, 2: 3, 3: 2, 4: 3}
    assert files(output) == files(single)
    # One listed, and the others said for whom they wait.
    waited = [number for number in (1, 2) if "waiting for partition " in told[number][1]]
    waited += [3] if "waiting for partition " in third.communicate()[1] else []
    waited += [4] if "waiting for partition " in fourth.communicate()[1] else []
    assert len(waited) == 3
    for number in (3, 4):
        assert (
            f"the last run (partition {number}/4, process {begun[number - 1].pid} on"
            in (told[number][1])
        )
    told = status_of(resfeat, output)
    assert told["complete"] and not any(each["writer"] for each in told["partitions"])
    assert not [path for path in (output / "_resfeat" / "tmp").rglob("*") if path.is_file()]
    verified = resfeat("verify", output)
    assert verified.returncode == 0 and "Nothing is wrong" in verified.stdout


def test_a_partition_that_was_never_started_is_named_and_a_run_of_all_does_what_is_left(
    pictures, single, resfeat, tmp_path
):
    output = tmp_path / "out"
    command = ["extract", pictures, "-o", output, *OPTIONS]
    for n in (1, 3):
        done = resfeat(*command, "--partition", f"{n}/3")
        assert done.returncode == 0, done.stderr
        assert f" in partition {n}/3 of {output}" in done.stdout
    told = status_of(resfeat, output)
    assert [tuple(each.values()) for each in told["partitions"]] == [
        ("1/3", 0, True, None), ("2/3", 4, False, None), ("3/3", 0, True, None),
    ]  # fmt: skip
    assert (
        "1/3 done, 2/3 4 shards left, never started, 3/3 done" in resfeat("status", output).stdout
    )
    stood = {path.name: path.stat() for path in (output / "embeddings").iterdir()}
    done = resfeat(*command, "--log-json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["shards"], report["embedded"], report["partition"]) == (4, IMAGES, None)
    for name, before in stood.items():
        now = (output / "embeddings" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert files(output) == files(single)
    assert status_of(resfeat, output)["complete"]


def test_a_partition_is_refused_beside_a_run_of_all(
    pictures, single, gate, gated, resfeat, tmp_path
):
    output = tmp_path / "out"
    command = ["extract", pictures, "-o", output, *OPTIONS]
    with ended([start(*command, env={**gated, "FREE": "1"})]) as (run,):
        until(lambda: commits(gated), [run])
        before = everything(output)
        line = refused(resfeat(*command, "--partition", "1/2"))
        assert f"{output} is being written by process {run.pid} on " in line
        assert everything(output) == before
        assert not status_of(resfeat, output)["partitions"]
        gate[0].unlink()
        _, complained = run.communicate(timeout=120)
    assert run.returncode == 0, complained
    assert files(output) == files(single)


def test_what_would_be_another_dataset_is_refused_where_a_partition_has_only_just_begun(
    pictures, single, gate, gated, resfeat, tmp_path
):
    """As yet nothing is committed, so a run alone would be free to choose."""
    output = tmp_path / "out"
    command = ["extract", pictures, "-o", output, *OPTIONS]
    with ended([start(*command, "--partition", "1/2", env=gated)]) as (run,):
        until(lambda: Layout(output).spec.exists() and "plan-0" in str(everything(output)), [run])
        before = {path: (output / "_resfeat" / path).read_bytes()
                  for path in ("spec.json", "plan/plan-00000.parquet")}  # fmt: skip
        # With other weights, of other images, and cut otherwise.
        share = ["--partition", "2/2"]
        for other in (
            [*command, *share, "--weights", "random:2"],
            ["extract", pictures / "a", "-o", output, *OPTIONS, *share],
            [*command, *share, "--shard-size", 7],
        ):
            assert f"{output} was made with another " in refused(resfeat(*other), 2)
        assert "is being written by partition 1/2" in refused(resfeat("verify", output, "--repair"))
        assert {path: (output / "_resfeat" / path).read_bytes() for path in before} == before
        gate[0].unlink()
        _, complained = run.communicate(timeout=120)
    assert run.returncode == 0, complained
    done = resfeat(*command, *share)
    assert done.returncode == 0, done.stderr
    assert files(output) == files(single)


def test_where_the_one_that_lists_is_killed_another_lists(pictures, single, resfeat, tmp_path):
    output = tmp_path / "out"
    command = ["extract", pictures, "-o", output, *OPTIONS]
    env = after_import({"resfeat.plan.files": KILLED_LISTING}, tmp_path / "killed")
    first = start(*command, "--partition", "1/2", env=env)
    assert first.wait(120) == -signal.SIGKILL
    drafts = output / "_resfeat" / "tmp"
    assert [path.name[-18:] for path in drafts.rglob("*.parquet")] == ["plan-00000.parquet"]
    for n in (2, 1):
        done = resfeat(*command, "--partition", f"{n}/2")
        assert done.returncode == 0, done.stderr
        assert not list(drafts.rglob("*.parquet"))
        assert (output / "_resfeat" / "locks" / "all").read_text() == ""
    assert f"the last run (partition 1/2, process {first.pid} on " in done.stderr
    assert files(output) == files(single)


@pytest.mark.parametrize(
    ("text", "variables", "number"),
    [
        ("1/1", {}, "1/1"),
        ("4/4", {}, "4/4"),
        ("auto", {"ID": 0, "MIN": 0, "MAX": 9, "STEP": 1}, "1/10"),
        ("auto", {"ID": 9, "MIN": 0, "MAX": 9, "STEP": 1}, "10/10"),
        ("auto", {"ID": 7, "MIN": 3, "MAX": 9, "STEP": 2}, "3/4"),
        ("auto", {"ID": 7, "MIN": 3, "MAX": 8, "STEP": 2, "COUNT": 2}, "3/3"),
        ("auto/20", {"ID": 4, "MIN": 1, "MAX": 10, "STEP": 1}, "4/20"),
    ],
)
def test_which_partition_it_is(text, variables, number):
    environment = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in variables.items()}
    # A task of an array has these as well, of its one process.
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"} if variables else {}
    given = Partition.parse(text, environment | step)
    assert str(given) == number
    assert Partition.of_share(given.share) == given


def test_which_partition_it_is_elsewhere():
    step = {"SLURM_PROCID": "2", "SLURM_NTASKS": "8"}
    assert str(Partition.parse("auto", step)) == "3/8"
    assert str(Partition.parse("auto/5", {"JOB_COMPLETION_INDEX": "4"})) == "5/5"


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        *((text, {}) for text in ("", "1", "/", "1/", "/2", "0/2", "3/2", "-1/2", "1/2/3", "a/b")),
        ("1.0/2", {}),
        ("0/0", {}),
        ("auto", {}),
        ("auto/", {}),
        ("auto/3", {}),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}),  # of how many?
        ("auto/3", {"JOB_COMPLETION_INDEX": "3"}),
        ("auto/3", {"JOB_COMPLETION_INDEX": "x"}),
        ("auto", {"SLURM_PROCID": "1"}),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}),
    ],
)
def test_what_is_no_partition(text, environment):
    with pytest.raises(UsageError, match=r"^--partition .*give ") as raised:
        Partition.parse(text, environment)
    assert "\n" not in str(raised.value)


def test_every_shard_is_of_one_partition():
    every = [Partition(number, 7) for number in range(1, 8)]
    for shard in range(100):
        assert len([each for each in every if each.has(shard)]) == 1


def test_the_schedulers_variables_by_the_command(pictures, single, resfeat, tmp_path):
    output = tmp_path / "out"
    command = ["extract", pictures, "-o", output, *OPTIONS]
    for given in (["auto"], ["auto/3"], ["3/2"], ["1/2", "--update"]):
        refused(resfeat(*command, "--partition", *given), 2)
        assert not output.exists()
    names = ("ID", "MIN", "MAX", "STEP")
    slurm = {
        f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in zip(names, (12, 10, 12, 2), strict=True)
    }
    kubernetes = {"JOB_COMPLETION_INDEX": "0"}
    for given, env, number in (("auto", slurm, 2), ("auto/2", kubernetes, 1)):
        done = resfeat(*command, "--partition", given, env=env)
        assert done.returncode == 0, done.stderr
        assert f" in partition {number}/2 of {output}" in done.stdout
    assert files(output) == files(single)


# Parity as no two processes measure it.
OWN_PARITY = """
import dataclasses, os

measured = compare

def compare(*given):
    parity = measured(*given)
    return parity and dataclasses.replace(parity, median=1 - os.getpid() / 1e9)
"""


@pytest.mark.more
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_a_sample_gave_is_settled_once_for_all(precision, pictures, tmp_path):
    """Each measures it, and, of int8, would make a network of its own."""
    output = tmp_path / "out"
    gate, env = behind_a_gate(tmp_path)
    env = {**env, **after_import({
        "resfeat.fidelity.parity": OWN_PARITY, "resfeat.dataset.commit": COUNTED,
    }, tmp_path / "parity")}  # fmt: skip
    runtime = ["--runtime", {"bf16": "torch", "int8": "openvino"}[precision]]
    command = ["extract", pictures, "-o", output, *OPTIONS, "--precision", precision, *runtime]
    runs = [start(*command, "--partition", f"{n}/3", env=env) for n in (1, 2, 3)]
    with ended(runs):
        # All have measured before the first one commits.
        drafts = output / "_resfeat" / "tmp"
        until(lambda: len({path.parent for path in drafts.rglob("*-part-*")}) == 3, runs)
        gate.unlink()
        told = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], told
    spec = json.loads((output / "_resfeat" / "spec.json").read_text())
    assert 1 - spec["parity"]["median"] in [pytest.approx(run.pid / 1e9, abs=1e-12) for run in runs]
    metadata = [pq.read_schema(part).metadata[b"resfeat"]
                for part in (output / "embeddings").iterdir()]  # fmt: skip
    assert len(metadata) == SHARDS and len(set(metadata)) == 1
    about = json.loads(metadata[0])
    assert (about["parity"], about.get("quantised")) == (spec["parity"], spec["quantised"])
    calibrated = [complained for _, complained in told if "int8: calibrated on" in complained]
    assert len(calibrated) == (precision == "int8")


@pytest.mark.more
@pytest.mark.ray
def test_partitions_and_an_update_by_ray(pictures, single, resfeat, tmp_path):
    source, output = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(pictures, source)
    command = ["extract", source, "-o", output, *OPTIONS, "--workers", 1]
    for n in (2, 1):
        done = resfeat(*command, "--partition", f"{n}/2")
        assert done.returncode == 0, done.stderr
    before = {path.name: path.stat().st_ino for path in (output / "embeddings").iterdir()}
    assert rows(output).equals(rows(single))

    paths = sorted(source.rglob("*.png"))
    paths[0].unlink()
    paths[20].write_bytes(paths[30].read_bytes())
    (source / "new.png").write_bytes(paths[1].read_bytes())
    done = resfeat(*command, "--update")
    assert done.returncode == 0, done.stderr
    assert f"Update: 1 added, 1 changed, 1 removed, {IMAGES - 1} kept, 0 failed" in done.stdout
    fresh = resfeat("extract", source, "-o", tmp_path / "fresh", *OPTIONS)
    assert fresh.returncode == 0, fresh.stderr
    assert rows(output).equals(rows(tmp_path / "fresh"))
    after = {path.name: path.stat().st_ino for path in (output / "embeddings").iterdir()}
    assert len([name for name in after if after[name] != before.get(name)]) == 3


@pytest.fixture
def late(monkeypatch):
    """Runs begin at the same moment: none sees another before it has a lock of its own. Gives what
    ends a wait that should not be."""
    monkeypatch.setattr(held, "_check_alone", lambda layout: None)
    given_up = time.monotonic() + 20
    return lambda: time.monotonic() > given_up


@pytest.mark.parametrize(
    ("first", "second", "is_refused"),
    [
        ("all", "1-of-2", False),  # not before it needs the lock of the whole, see below
        ("1-of-2", "all", True),
        ("1-of-2", "2-of-2", False),
        ("1-of-2", "1-of-2", True),
        ("1-of-2", "1-of-3", True),
    ],
)
def test_of_two_that_begin_together_one_sees_the_other(first, second, is_refused, late, tmp_path):
    output = tmp_path / "out"
    with held.held(Layout(output, first)), ExitStack() as stack:
        refuses = pytest.raises(HeldError, match=f"process {os.getpid()} on ")
        if is_refused:
            stack.enter_context(refuses)
        with held.held(Layout(output, second)):
            assert not is_refused
            if first == "all":
                with refuses, held.whole(Layout(output, second), stopping=late):
                    pass


def test_a_partition_waits_for_another_that_has_the_whole_and_for_one_of_no_name(tmp_path):
    mine, other = Layout(tmp_path / "out", "1-of-2"), Layout(tmp_path / "out", "2-of-2")
    told, stopping = [], lambda: len(told) > 0
    with held.held(mine), held.held(other):
        refuses = pytest.raises(Stopped)
        with held.whole(other), refuses, held.whole(mine, told.append, stopping):
            raise AssertionError("two have it")
        assert "waiting for partition 2/2, process" in told[0]

        # Just when it is taken, the lock has no name, or that of the run before.
        word = replace(Writer.me(), pid=2**22 + 1).as_json()
        lock = mine.lock.parent / "all"
        for name in ("", word):
            with open(lock, "w") as file:
                file.write(name)
                file.flush()
                fcntl.flock(file, fcntl.LOCK_EX)
                threading.Timer(1, file.close).start()
                with held.whole(mine):
                    assert Writer.parse(lock.read_text()).share == "1-of-2"
            # Of a run of all that was killed there is word afterwards, for the next one.
            assert lock.read_text() == name
        lock.write_text(replace(Writer.parse(word), share="2-of-2").as_json())
        with held.whole(mine):
            pass
        assert lock.read_text() == ""
