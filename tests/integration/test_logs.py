"""What a run tells programs is what LOGS.md says: each line, each field, each metric."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command import call, error_of
from forked import start
from integration.test_resume import wait_for_parts
from prometheus_client.parser import text_string_to_metric_families
from seams import UNHURRIED, after_import
from small import write_pictures

from resfeat.errors import REASONS, UsageError
from resfeat.reporting import Metrics, Progress, metrics

PAGE = (Path(__file__).parents[2] / "LOGS.md").read_text()
QUICK = ["--model", "cifar_resnet20", "--weights", "random:0", "--runtime", "torch",
         "--workers", 0]  # fmt: skip
TYPES = {"string": str, "integer": int, "number": (int, float), "object": dict, "array": list,
         "null": type(None)}  # fmt: skip


def table(title):
    """The rows of the first table below a title of the page."""
    (section,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): cells[1].strip() for cells in lines}


ALWAYS, REPORT = table("Lines of `--log-json`"), table("The report")
EVENTS = {name: table(f"`{name}`") for name in re.findall(r"^### `(\w+)`", PAGE, re.M)}
EVENTS["report"] = REPORT


def misfits(told, fields):
    """What is not as a table says."""
    wrong = [f"{name} is missing" for name in fields.keys() - told.keys()]
    wrong += [f"{name} is not in LOGS.md" for name in told.keys() - fields.keys()]
    for name in fields.keys() & told.keys():
        kinds = [TYPES[kind.strip()] for kind in fields[name].split(",")]
        value = told[name]
        if isinstance(value, bool) or not any(isinstance(value, kind) for kind in kinds):
            wrong.append(f"{name} is {value!r} and not {fields[name]}")
    return wrong


def lines(done):
    """The lines of a run, each of which is as the page says."""
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for each in told:
        assert misfits(each, ALWAYS | EVENTS[each["event"]]) == [], each["event"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each["time"])
    assert [each["time"] for each in told] == sorted(each["time"] for each in told)
    return told


def samples(file):
    """What a file of metrics says, as Prometheus' own client reads it: by name and other labels."""
    found = {}
    for family in text_string_to_metric_families(file.read_text()):
        assert family.type == "gauge" and family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("output")
            found[(sample.name, *labels.values())] = sample.value
    return found


def check_with_promtool(file):
    if promtool := shutil.which("promtool"):
        told, words = file.read_text(), [promtool, "check", "metrics"]
        done = subprocess.run(words, input=told, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.fixture
def job(tmp_path):
    """Twelve pictures, a broken one, and the words of a run that tells all."""
    write_pictures(tmp_path / "photos", 12)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    return [tmp_path / "photos", "-o", tmp_path / "out", *QUICK, "--shard-size", 4, "--log-json",
            "--metrics", tmp_path / "out.prom", "--max-error-rate", 0.5]  # fmt: skip


def reports(output):
    return [json.loads(path.read_bytes()) for path in sorted((output / "_resfeat/runs").iterdir())]


def test_every_line_of_runs_that_finish_change_and_fail(job, tmp_path):
    output, file = tmp_path / "out", tmp_path / "out.prom"
    seen = set()

    def run(*words, code):
        done = call("extract", *job, *words)
        assert done.returncode == code, done.stderr
        told = lines(done)
        seen.update(each["event"] for each in told)
        return told[-1]

    ahead = run("--dry-run", code=0)
    assert (ahead["event"], ahead["images"]) == ("preview", 13) and not file.exists()

    begun = time.time()
    first = run(code=0)
    assert (first["status"], first["embedded"], first["failed"]) == ("finished", 12, 1)
    assert first["bytes_read"] == sum(
        path.stat().st_size for path in (tmp_path / "photos").rglob("*.*")
    )
    (written,) = reports(output)
    assert misfits(written, REPORT) == []
    assert {**written, "event": "report", "time": first["time"]} == first
    now = samples(file)
    check_with_promtool(file)
    assert {name for name, *_ in now} == table("Metrics of `--metrics`").keys()
    assert now["resfeat_images",] == now["resfeat_images_done",] == 13
    assert now["resfeat_images_embedded",] == 12
    failed = {labels[0]: value for (name, *labels), value in now.items()
              if name == "resfeat_images_failed"}  # fmt: skip
    assert failed == dict.fromkeys(REASONS, 0) | first["reasons"]
    assert now["resfeat_run_images",] == 13 and now["resfeat_run_shards",] == 4
    assert now["resfeat_run_read_bytes",] == first["bytes_read"]
    for stage, seconds in first["stages"].items():
        assert now["resfeat_run_stage_seconds", stage] == seconds
    assert now["resfeat_run_active",] == now["resfeat_run_exit_code",] == 0
    success = now["resfeat_last_success_timestamp_seconds",]
    assert begun < now["resfeat_run_start_timestamp_seconds",] < success < time.time()
    assert list(tmp_path.glob("*out.prom*")) == [file]

    (tmp_path / "photos" / "broken.jpg").unlink()
    second = run("--update", "--max-error-rate", 0, code=0)
    assert second["update"] == {"added": 0, "changed": 0, "removed": 1, "kept": 12}
    assert samples(file)["resfeat_images",] == 12

    success = samples(file)["resfeat_last_success_timestamp_seconds",]
    (output / "embeddings" / "part-00001.parquet").unlink()
    for each in (tmp_path / "photos").iterdir():
        shutil.rmtree(each)
    wrong = run(code=1)
    (left,) = (each for each in reports(output) if each["status"] == "failed")
    assert left["error"] == wrong["text"] and misfits(left, REPORT) == []
    assert wrong["event"] == "error" and wrong["exit_code"] == 1
    now = samples(file)
    assert now["resfeat_run_exit_code",] == 1 and now["resfeat_run_active",] == 0
    assert now["resfeat_last_success_timestamp_seconds",] == success
    assert not {name for name, *_ in now} & metrics.LAST_RUN.keys()
    usage = run("--model", "vgg", code=2)
    assert (usage["event"], usage["exit_code"]) == ("error", 2)
    assert samples(file)["resfeat_run_exit_code",] == 2
    assert seen == EVENTS.keys() - {"note"}


def test_every_line_of_a_run_that_is_killed_stopped_and_done(job, tmp_path):
    """The file of metrics follows it, and keeps what it said of the last run meanwhile."""
    output, file = tmp_path / "out", tmp_path / "out.prom"
    slower = {"resfeat.decoding.decode": UNHURRIED.replace("0.01", "0.3")}
    slow = {**after_import(slower, tmp_path / "hook"), "RESFEAT_METRICS": str(file)}
    words = ["extract", *job[:-4], "--shard-size", 1, *job[-2:]]  # without --metrics
    killed = start(*words, env=slow)
    while not file.exists() or "resfeat_run_workers" not in file.read_text():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    wait_for_parts(killed, output, 1)
    now = samples(file)
    assert now["resfeat_run_active",] == 1 and ("resfeat_run_exit_code",) not in now
    assert now["resfeat_images",] == 13 and now["resfeat_run_workers",] == 1
    killed.kill()
    killed.wait(60)
    assert samples(file)["resfeat_run_active",] == 1

    stopped = start(*words, env=slow)
    wait_for_parts(stopped, output, 4)
    stopped.send_signal(signal.SIGTERM)
    out, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 128 + signal.SIGTERM
    *before, report = lines(subprocess.CompletedProcess(words, 143, out, ""))
    assert {"step", "note", "progress"} <= {each["event"] for each in before}
    assert report["status"] == "interrupted" and report["shards_left"] > 0
    assert "was killed" in report["notes"][0]
    now = samples(file)
    assert now["resfeat_run_active",] == 0 and now["resfeat_run_exit_code",] == 143
    assert now["resfeat_shards_left",] == report["shards_left"]
    assert ("resfeat_last_success_timestamp_seconds",) not in now

    (tmp_path / "job.toml").write_text(f"metrics = {json.dumps(str(file))}\n")
    done = call(*words, "--config", tmp_path / "job.toml")
    assert done.returncode == 0 and lines(done)[-1]["status"] == "finished"
    assert samples(file)["resfeat_images_done",] == 13
    for each in reports(output):
        assert misfits(each, REPORT) == []


def test_while_a_run_goes_on_the_file_keeps_what_it_says_of_the_last(tmp_path, monkeypatch):
    file, ended = tmp_path / "a.prom", {"resfeat_run_exit_code": 7, "resfeat_run_images": 5}
    odd = tmp_path / 'o"u\\t\nx'
    first = Metrics(str(file), str(odd), "2/4")
    for name, value in ended.items():
        first._set(name, value)
    first._write()
    (family,) = (each for each in text_string_to_metric_families(file.read_text())
                 if each.name == "resfeat_run_images")  # fmt: skip
    assert family.samples[0].labels == {"output": str(odd), "partition": "2/4"}

    for output, partition in ((odd, None), (odd, "1/4"), (tmp_path / "other", "2/4")):
        other = tmp_path / "b.prom"
        shutil.copy(file, other)
        Metrics(str(other), str(output), partition)
        assert "resfeat_run_images" not in other.read_text()
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    second = Metrics(str(file), str(odd), "2/4")
    for waited, done, seen in ((0, 1, 1), (4, 2, 1), (1, 3, 3), (1, 4, 3), (5, 5, 5)):
        now[0] += waited
        second.show(Progress(9, done, 0, 1))
        second.show(Progress(None, 1000, doing="listing"))
        found = {name: value for (name, *_), value in samples(file).items()}
        assert found.get("resfeat_images_done") == seen
        assert ended.items() <= found.items() and found["resfeat_run_active"] == 1


def test_the_collector_never_sees_a_draft(tmp_path, monkeypatch):
    """It reads all that is called *.prom."""
    there, replace = [], os.replace

    def replaced(draft, file):
        there.append((sorted(tmp_path.glob("*.prom")), Path(draft).read_text()[-1]))
        replace(draft, file)

    monkeypatch.setattr(os, "replace", replaced)
    told = Metrics(str(tmp_path / "a.prom"), str(tmp_path / "out"), None)
    told.end(0, None)
    assert there == [([], "\n"), ([tmp_path / "a.prom"], "\n")]


def test_a_file_that_cannot_be_written(job, tmp_path, monkeypatch):
    """At the start that ends the run before it is one; later the run is worth more."""
    there = call("extract", *job, "--metrics", tmp_path / "no" / "out.prom")
    assert there.returncode == 2 and not (tmp_path / "out").exists()
    assert error_of(there.stderr) == (
        f"Error: cannot write --metrics {tmp_path}/no/out.prom (No such file or directory): "
        "name a file in a folder that is there and can be written"
    )
    assert lines(there)[-1]["event"] == "error"
    with pytest.raises(UsageError, match="Is a directory"):
        Metrics(str(tmp_path), str(tmp_path / "out"), None)

    (tmp_path / "gone").mkdir()
    step = Metrics.end

    def end(self, *words):
        (tmp_path / "gone" / "out.prom").unlink()
        (tmp_path / "gone").rmdir()
        step(self, *words)

    monkeypatch.setattr(Metrics, "end", end)
    done = call("extract", *job, "--metrics", tmp_path / "gone" / "out.prom")
    assert done.returncode == 0 and lines(done)[-1]["event"] == "report"
    assert "Note: --metrics could not be written" in done.stderr
