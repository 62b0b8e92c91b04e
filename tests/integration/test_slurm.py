"""The scripts of pipelines/slurm/, as they are, in a real Slurm with two nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from seams import UNHURRIED, after_import
from slurm import SCRIPTS, Slurm, missing
from small import vectors_of, write_pictures
from tables import rows

from resfeat.dataset import Layout

IMAGES, SHARDS = 30, 15
OPTIONS = ["--model", "cifar_resnet20", "--weights", "random:0", "--runtime", "torch"]
QUICK = [*OPTIONS, "--workers", 0, "--batch-size", 4, "--shard-size", IMAGES // SHARDS]

# After FREE commits the run stands still with the next part written, for as long as GATE is there.
GATED = """
import itertools, os, time

count = itertools.count()

def on_step(step):
    if step == "written" and next(count) >= int(os.environ["FREE"]):
        while os.path.exists(os.environ["GATE"]):
            time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def slurm():
    if absent := missing():
        pytest.skip(f"no {', '.join(absent)}: on Debian, apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    ours = Slurm(folder)
    try:
        ours.start()
        yield ours
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        ours.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pictures(once) -> Path:
    return once("pictures-for-slurm", lambda folder: write_pictures(folder, IMAGES))


@pytest.fixture(scope="module")
def single(pictures, extracted) -> Path:
    """What one undisturbed run makes of them."""
    return extracted("single-for-slurm", pictures, *QUICK)


@pytest.fixture
def gate(tmp_path):
    """A file, and the environment of runs that stand still while it is there."""
    path = tmp_path / "gate"
    path.touch()
    hook = after_import({"resfeat.dataset.commit": GATED}, tmp_path / "hook")
    return path, {"PYTHONPATH": hook["PYTHONPATH"], "GATE": str(path), "FREE": "1"}


def until(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.2)


def log_of(folder: Path, job: str) -> str:
    path = folder / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def committed(output: Path) -> int:
    return len(Layout(output).committed()) if output.exists() else 0


def is_whole(output: Path, single: Path) -> bool:
    """Whether each image is one row, and has the bits of an undisturbed run."""
    ids = rows(output)["id"].to_pylist()
    return len(ids) == len(set(ids)) == IMAGES and vectors_of(output) == vectors_of(single)


def outcome(job: dict[str, str]) -> tuple[str, str, str]:
    return job["JobState"], job["ExitCode"], job["Restarts"]


def test_the_three_scripts_are_one_from_a_line_on():
    texts = {path.stem: path.read_text() for path in SCRIPTS.iterdir()}
    assert set(texts) == {"one_node", "array", "ray"}
    same = {text.partition("# From here on the three scripts are the same.\n")[2]
            for text in texts.values()}  # fmt: skip
    assert len(same) == 1 and "scontrol requeue" in same.pop()
    for name, text in texts.items():
        for line in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
            assert f"\n#SBATCH {line}\n" in text, name
        assert f"sbatch {name}.sbatch OUT SRC" in text


# Programs, as they are for a job that ends when its first signal comes.
STAND_INS = {
    "squeue": "echo 2026-11-26T12:00:00",
    "scontrol": "exit 1",
    "resfeat": """[ "$1" = extract ] || exit 1
trap 'exit 143' TERM
echo "until $SLURM_JOB_END_TIME" > told.new
mv told.new told
while :; do sleep 0.1; done""",
}


@pytest.mark.parametrize("given", ["", "1800000000"])
def test_the_code_is_resfeats_also_where_it_ends_while_its_signal_is_taken(given, tmp_path):
    """And it is told when the job ends, less what a run has to stop, by older Slurms, too."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TZ": "UTC", "SLURM_JOB_ID": "1",
        "SLURM_JOB_END_TIME": given,
        # So that it has ended by the time that the script goes on.
        "BASH_FUNC_kill%%": '() { builtin kill "$@"; set -- $?; sleep 0.5; return "$1"; }',
    }  # fmt: skip
    script = subprocess.Popen(["bash", SCRIPTS / "one_node.sbatch", "out", "photos"], env=env,
                              cwd=tmp_path, stderr=subprocess.PIPE, text=True)  # fmt: skip
    until((tmp_path / "told").exists, 60)
    assert (tmp_path / "told").read_text() == f"until {int(given or 1795694400) - 100}\n"
    script.send_signal(signal.SIGUSR1)
    assert "not queued again, since this run did no shard" in script.communicate(timeout=60)[1]
    assert script.returncode == 143


def test_a_job_whose_time_is_nearly_over_is_drained_queued_again_and_goes_on(
    slurm, pictures, single, gate, tmp_path
):
    output = tmp_path / "out"
    job = slurm.submit("one_node.sbatch", output, pictures, *QUICK, folder=tmp_path, env=gate[1])
    until(lambda: committed(output) == 1)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does it before the limit
    until(lambda: "stopping: finishing" in log_of(tmp_path, job))
    gate[0].unlink()
    assert outcome(*slurm.ended(job)) == ("COMPLETED", "0:0", "1")
    assert is_whole(output, single)
    told = log_of(tmp_path, job)
    assert told.count("Stopped, the same command goes on") == 1
    assert f"Finished: {IMAGES} embedded and 0 failed" in told


@pytest.mark.more
def test_failures_are_tried_again_once_each_by_a_job_that_is_queued_again(
    slurm, pictures, resfeat, gate, tmp_path
):
    broken, output = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(pictures, broken)
    for path in sorted(broken.rglob("*.*"))[::3]:
        path.write_bytes(b"no image")
    options = [broken, *QUICK, "--max-error-rate", 1]
    assert resfeat("extract", *options, "-o", output).returncode == 0
    failed = len(list((output / "failures").iterdir()))
    job = slurm.submit("one_node.sbatch", output, *options, "--retry-failed", folder=tmp_path,
                       env=gate[1])  # fmt: skip
    until(lambda: list(Layout(output).tmp.glob("*part-*")))
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: "stopping: finishing" in log_of(tmp_path, job))
    gate[0].unlink()
    assert outcome(*slurm.ended(job)) == ("COMPLETED", "0:0", "1"), log_of(tmp_path, job)
    assert "shards and was stopped: what failed in these is not tried" in log_of(tmp_path, job)
    reports = [json.loads(each.read_text()) for each in (output / "_resfeat" / "runs").iterdir()]
    again = [each["shards"] for each in sorted(reports, key=lambda each: each["run_id"])[1:]]
    assert sum(again) == failed and 0 < again[0] < failed


@pytest.mark.more
def test_a_job_that_comes_to_its_time_limit(slurm, pictures, single, gate, tmp_path):
    """With Slurm's own clock, that has minutes and looks every half of one."""
    output = tmp_path / "out"
    job = slurm.submit("one_node.sbatch", output, pictures, *QUICK, folder=tmp_path, env=gate[1],
                       sbatch=["--time=2", "--signal=B:USR1@30"])  # fmt: skip
    until(lambda: "stopping: finishing" in log_of(tmp_path, job))
    gate[0].unlink()
    state, code, restarts = outcome(*slurm.ended(job))
    assert (state, code) == ("COMPLETED", "0:0"), log_of(tmp_path, job)
    assert int(restarts) >= 1  # on a busy machine one more, since each has two minutes
    assert is_whole(output, single)


@pytest.mark.more
def test_a_job_that_did_no_shard_is_not_queued_again_and_has_said_so_early(
    slurm, pictures, tmp_path
):
    hook = after_import(
        {"resfeat.decoding.decode": UNHURRIED.replace("0.01", "0.2")}, tmp_path / "hook"
    )
    env = {"PYTHONPATH": hook["PYTHONPATH"]}
    table, picture = tmp_path / "images.csv", next(pictures.rglob("*.jpg"))
    table.write_text("\n".join(["uri,key", *(f"{picture},{n}" for n in range(50_000))]))
    job = slurm.submit("one_node.sbatch", tmp_path / "out", table, *QUICK, "--shard-size", 50_000,
                       "--id-column", "key", "--cpus-per-worker", 2, folder=tmp_path, env=env,
                       sbatch=["--time=20"])  # fmt: skip
    until(lambda: "no shard will be done in the time of this job" in log_of(tmp_path, job))
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert outcome(*slurm.ended(job)) == ("FAILED", "143:0", "0")
    told = log_of(tmp_path, job)
    assert "Note: no shard was done in this run: give it more time, or a new output" in told
    assert "nothing was left to do" not in told
    assert told.splitlines()[-1].startswith("not queued again, since this run did no shard")


@pytest.mark.more
def test_a_cancelled_job_stays_so_and_the_same_command_goes_on(
    slurm, pictures, single, gate, tmp_path
):
    output = tmp_path / "out"
    command = ["one_node.sbatch", output, pictures, *QUICK]
    job = slurm.submit(*command, folder=tmp_path, env=gate[1])
    until(lambda: committed(output) == 1)
    slurm.run("scancel", job)
    until(lambda: "stopping: finishing" in log_of(tmp_path, job))
    gate[0].unlink()
    assert outcome(*slurm.ended(job)) == ("CANCELLED", "143:0", "0")
    assert "Stopped, the same command goes on" in log_of(tmp_path, job)
    assert 1 < (before := committed(output)) < SHARDS
    again = slurm.submit(*command, folder=tmp_path)
    assert outcome(*slurm.ended(again)) == ("COMPLETED", "0:0", "0")
    assert f"{before * IMAGES // SHARDS} of {IMAGES} images" in log_of(tmp_path, again)
    assert is_whole(output, single)
    assert outcome(*slurm.jobs(job)) == ("CANCELLED", "143:0", "0")


@pytest.mark.more
def test_an_array_of_three_one_of_which_is_drained(slurm, pictures, single, gate, tmp_path):
    output = tmp_path / "out"
    array = slurm.submit("array.sbatch", output, pictures, *QUICK, folder=tmp_path, env=gate[1],
                         sbatch=["--array=0-2", "--cpus-per-task=5"])  # fmt: skip
    until(lambda: committed(output) == 3)
    # The one that has the number of the whole array as its own.
    (last,) = (job for job in slurm.jobs(array) if job["JobId"] == array)
    task = f"{array}_{last['ArrayTaskId']}"
    slurm.run("scancel", "--batch", "--signal=USR1", task)
    until(lambda: "stopping: finishing" in log_of(tmp_path, task))
    gate[0].unlink()
    jobs = slurm.ended(array)
    assert [job["ArrayTaskId"] for job in jobs] == ["0", "1", "2"]
    assert [outcome(job) for job in jobs] == [
        ("COMPLETED", "0:0", "1" if job["JobId"] == array else "0") for job in jobs
    ]
    assert is_whole(output, single)


@pytest.mark.more
def test_what_the_exit_codes_say(slurm, pictures, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(pictures, broken)
    for number in range(5):
        (broken / f"{number}.jpg").write_bytes(b"no image")
    (tmp_path / "file").touch()
    expected = {
        2: [],
        3: [tmp_path / "out", broken, *QUICK],
        1: [tmp_path / "file" / "out", pictures, *QUICK],
    }
    jobs = {code: slurm.submit("one_node.sbatch", *arguments, folder=tmp_path)
            for code, arguments in expected.items()}  # fmt: skip
    for code, job in jobs.items():
        found = outcome(*slurm.ended(job))
        assert found == ("FAILED", f"{code}:0", "0"), log_of(tmp_path, job)
    assert "usage: sbatch one_node.sbatch OUT SRC" in log_of(tmp_path, jobs[2])


@pytest.mark.more
@pytest.mark.ray
def test_two_nodes_are_one_ray(slurm, pictures, single, tmp_path):
    output = tmp_path / "out"
    env = {"RAY_raylet_start_wait_time_s": "120"}
    job = slurm.submit("ray.sbatch", output, pictures, *OPTIONS, "--batch-size", 4,
                       "--shard-size", IMAGES // SHARDS, folder=tmp_path, env=env,
                       sbatch=["--nodes=2", "--cpus-per-task=1"])  # fmt: skip
    found = outcome(*slurm.ended(job))
    assert found == ("COMPLETED", "0:0", "0"), log_of(tmp_path, job)
    assert is_whole(output, single)
    (report,) = (output / "_resfeat" / "runs").iterdir()
    assert json.loads(report.read_text())["engine"]["workers"] == 2
    until(lambda: not [each for each in slurm.processes() if "ray" in " ".join(each.cmdline())], 60)
