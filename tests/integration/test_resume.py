"""Killed, stopped, refused: the same command again finishes, and nothing is done twice."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow.dataset as ds
import pytest
from command import error_of
from forked import start
from tables import planned, rows, vectors

from resfeat.dataset import Layout

SHARD = 32
MORE = pytest.mark.more


def wait_for_parts(process, output, count):
    while len(Layout(output).committed()) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def ray_processes(driver):
    """Our workers and all of Ray but its idle agents, which take a minute to notice."""
    below = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in below if not title(child).endswith("Agent")]


def title(process):
    """What the process calls itself; nothing once it has ended."""
    try:
        return (process.cmdline() or [""])[0].rpartition("/")[2]
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=MORE)])
def test_sigkill_half_way(workers, copied, choices, inline, unhurried, resfeat, tmp_path):
    output = tmp_path / "out"
    command = ["extract", copied, "-o", output, *choices, "--workers", workers,
               "--shard-size", SHARD]  # fmt: skip
    process = start(*command, env=unhurried)
    wait_for_parts(process, output, 6)
    of_ray = ray_processes(process)
    titles = [title(child) for child in of_ray]
    # A worker's title goes on with the call that it is busy with.
    ours = [f"ray::resfeat-worker-{number}" for number in range(1, workers + 1)]
    for wanted in [*ours, "raylet", "gcs_server"] if workers else ():
        assert any(title.startswith(wanted) for title in titles), titles
    assert workers or not titles
    process.kill()
    process.wait()

    deadline = time.monotonic() + 30
    while orphans := [child for child in of_ray if child.is_running()]:
        assert time.monotonic() < deadline, orphans
        time.sleep(0.2)
    layout = Layout(output)
    committed = layout.committed()
    assert 6 <= len(committed) < 16
    time.sleep(1)
    assert layout.committed() == committed  # nobody commits late

    # Whatever was read again would now be missing and become a failure row.
    for shard in committed:
        for item in planned(layout, shard):
            (copied / item.id).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in layout.embeddings.iterdir()}

    done = resfeat(*command)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert rows(output).equals(rows(inline))
    columns = ["id", "stage", "reason", "message"]
    failures = rows(output, "failures").select(columns)
    assert failures.equals(rows(inline, "failures").select(columns))
    assert not list(layout.tmp.iterdir())


@pytest.mark.parametrize(
    ("workers", "number", "code"),
    [
        (0, signal.SIGINT, 130),
        *(
            pytest.param(workers, number, 128 + number, marks=MORE)
            for workers, number in ((0, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGTERM))
        ),
    ],
)
def test_a_signal_stops_the_run_in_order(
    number, code, workers, collection, choices, unhurried, tmp_path, resfeat
):
    output = tmp_path / "out"
    command = ["extract", collection, "-o", output, *choices, "--workers", workers,
               "--shard-size", SHARD]  # fmt: skip
    process = start(*command, env=unhurried)
    wait_for_parts(process, output, 1)
    process.send_signal(number)
    told, complained = process.communicate(timeout=30)
    assert process.returncode == code, complained
    assert "Stopped, the same command goes on" in told
    assert "stopping" in complained and "Traceback" not in complained
    assert not list(Layout(output).tmp.iterdir())
    assert 1 <= len(Layout(output).committed()) < 16
    status = resfeat("status", output)
    assert "no" in status.stdout.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.parametrize("seconds", [0.7, *(pytest.param(s, marks=MORE) for s in (0, 1.4, 2.1))])
def test_a_signal_while_ray_is_starting(seconds, collection, tmp_path):
    output = tmp_path / "out"
    process = start("extract", collection, "-o", output, "--model", "cifar_resnet20",
                    "--weights", "random:0")  # fmt: skip
    while not Layout(output).spec.exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 143, complained
    assert "Traceback" not in complained
    assert Layout(output).committed() == []


def test_a_second_signal_stops_at_once(collection, choices, unhurried, tmp_path):
    output = tmp_path / "out"
    command = ["extract", collection, "-o", output, *choices, "--workers", 0, "--shard-size", 1000]
    process = start(*command, env=unhurried)
    while not any(Layout(output).tmp.glob("*-part-*")):  # a shard is in hand
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # 512 images take longer than that
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode == 130
    assert Layout(output).committed() == []  # as it would be once the shard in hand is done


def test_a_second_signal_while_the_process_ends_is_still_ours():
    script = """
import os, signal
from resfeat.cli.signals import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received() and signals.exit_code == 143
os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_signal_after_the_end_of_a_run_does_not_change_its_exit_code():
    """A finished job of a scheduler would else count as stopped, and run again."""
    script = """
import os, signal
from resfeat.cli.signals import StopSignals
with StopSignals():
    pass
os.kill(os.getpid(), signal.SIGTERM)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 3 and "Traceback" not in done.stderr


def test_a_run_killed_while_it_listed_is_no_obstacle(photos, tmp_path, resfeat):
    output = tmp_path / "out"
    layout = Layout(output)
    for folder in layout.folders:
        folder.mkdir(parents=True)
    (layout.plan / "plan-00000.parquet").write_bytes(b"half a file")
    (layout.tmp / "abc-part-00000.parquet").write_bytes(b"half a part")
    done = resfeat("extract", photos / "chelsea", "-o", output, "--model", "cifar_resnet20",
                   "--weights", "random:0", "--workers", 0)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(layout.tmp.iterdir())


@pytest.fixture
def a_copy(inline, tmp_path):
    """Of the finished dataset, to be changed at will."""
    shutil.copytree(inline, tmp_path / "copy")
    return tmp_path / "copy"


def test_another_identity_is_refused_by_name(a_copy, collection, choices, resfeat):
    def refused(*options, source=collection):
        done = resfeat("extract", source, "-o", a_copy, "--workers", 0, *choices, *options)
        assert done.returncode == 2
        return error_of(done.stderr)

    before = {path: path.stat().st_mtime_ns for path in a_copy.rglob("*.parquet")}
    assert "another weights_digest" in refused("--weights", "random:0")
    assert "another model: resnet18 there, resnet34 now" in refused(
        "--model", "resnet34", "--weights", "random:0"
    )
    assert "another shard_size" in refused("--shard-size", 7)
    assert "another sources" in refused(source=collection / "some" / "china")
    assert {path: path.stat().st_mtime_ns for path in a_copy.rglob("*.parquet")} == before


def test_what_may_change_between_runs_is_not_refused(a_copy, inline, collection, choices, resfeat):
    """And changes no reason and no other column; the last bits of a vector belong to the runtime
    and its batches."""
    gone = Layout(a_copy).embeddings / "part-00001.parquet"
    gone.unlink()
    done = resfeat("extract", collection, "-o", a_copy, *choices, "--workers", 0, "--batch-size", 3,
                   "--runtime", "openvino", "--max-error-rate", 0.5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "This run: 128 images" in done.stdout
    now, before = rows(a_copy), rows(inline)
    assert now.drop_columns("embedding").equals(before.drop_columns("embedding"))
    assert np.allclose(vectors(now), vectors(before), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(vectors(now), vectors(before))  # it did run, in another way


def test_a_second_writer_is_refused_by_name(collection, choices, unhurried, tmp_path, resfeat):
    output = tmp_path / "out"
    command = ["extract", collection, "-o", output, *choices, "--workers", 0]
    first = start(*command, "--shard-size", SHARD, env=unhurried)
    wait_for_parts(first, output, 1)
    second = resfeat(*command)
    assert second.returncode == 1
    line = error_of(second.stderr)
    assert f"is being written by process {first.pid} on {os.uname().nodename}" in line
    status = resfeat("status", output).stdout
    assert f"process {first.pid}" in status
    first.communicate()
    assert first.returncode == 0
    assert f"process {first.pid}" not in resfeat("status", output).stdout


def test_a_reader_that_globs_during_the_run_sees_whole_parts_only(
    collection, choices, unhurried, tmp_path
):
    output = tmp_path / "out"
    process = start("extract", collection, "-o", output, *choices, "--workers", 0,
                    "--shard-size", SHARD, env=unhurried)  # fmt: skip
    seen = set()
    while process.poll() is None:
        if Layout(output).committed():
            table = ds.dataset(output / "embeddings", format="parquet").to_table(columns=["id"])
            seen.add(len(table))
            for part in (output / "embeddings").iterdir():
                shard = int(part.stem.rpartition("-")[2])
                listed = {item.id for item in planned(Layout(output), shard)}
                ids = ds.dataset(part).to_table(columns=["id"])["id"].to_pylist()
                failures = output / "failures" / part.name
                if failures.exists():
                    ids += ds.dataset(failures).to_table(columns=["id"])["id"].to_pylist()
                assert set(ids) == listed and len(ids) == len(listed)
        time.sleep(0.1)
    assert process.returncode == 0
    assert len(seen) > 3  # it grew while we looked


def test_a_source_that_is_gone_stops_the_resume(copied, choices, unhurried, tmp_path, resfeat):
    output = tmp_path / "out"
    command = ["extract", copied, "-o", output, *choices, "--workers", 0, "--shard-size", SHARD]
    process = start(*command, env=unhurried)
    wait_for_parts(process, output, 1)
    process.kill()
    process.wait()
    copied.rename(tmp_path / "elsewhere")
    done = resfeat(*command)
    assert done.returncode == 2
    assert "does not exist" in done.stderr
