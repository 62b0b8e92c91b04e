"""The command line: quick to start, clear when it is used wrongly, quiet when asked."""

import ast
import fcntl
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import termios
import time
from textwrap import indent

import pytest
from command import error_of
from PIL import Image

from resfeat.cli import COMMANDS, progress
from resfeat.reporting import Progress


@pytest.fixture
def one_photo(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    return folder


HERE = ["--model", "cifar_resnet20", "--weights", "random:0", "--workers", 0,
        "--runtime", "torch"]  # fmt: skip


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys; from resfeat.cli import main\n"
        f"try: main([*{command!r}, '--help'])\n"
        "finally: print(sorted({'torch', 'ray', 'pyarrow', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Example" in done.stdout or command == []


def test_help_takes_under_300_ms():
    def seconds():
        """Of the processor: the clock would also count what others do."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "resfeat", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_names_every_command(resfeat):
    told = resfeat("--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in told


def one_line(done, code):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    line = error_of(done.stderr)
    assert line.startswith("Error: ")
    return line


def test_bad_input_is_one_line_and_leaves_nothing(one_photo, tmp_path, resfeat):
    out = tmp_path / "deep" / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")

    def refused(*arguments, code):
        line = one_line(resfeat("extract", *arguments), code)
        assert not (tmp_path / "deep").exists()
        return line

    assert "does not exist" in refused(tmp_path / "no", "-o", out, *HERE, code=2)
    assert "no images in" in refused(tmp_path / "empty", "-o", out, *HERE, code=2)
    assert "passed over: 1 .txt" in refused(tmp_path / "texts", "-o", out, *HERE, code=2)
    assert "unknown model" in refused(one_photo, "-o", out, *HERE, "--model", "vgg", code=2)
    assert "unknown weights" in refused(one_photo, "-o", out, *HERE, "--weights", "best", code=2)
    assert "drop one" in refused(one_photo, "-o", out, *HERE, "--address", "auto", code=2)
    assert "is a file" in refused(one_photo, "-o", tmp_path / "file", *HERE, code=2)
    assert "other files" in refused(one_photo, "-o", tmp_path / "full", *HERE, code=2)
    assert "cannot write" in refused(one_photo, "-o", tmp_path / "file" / "out", *HERE, code=1)
    assert "is also a source" in refused(one_photo, "-o", one_photo, *HERE, code=2)
    assert "an empty path" in refused("", "-o", out, *HERE, code=2)
    assert "an empty path" in refused(one_photo, "-o", "", *HERE, code=2)
    assert "not UTF-8" in refused(one_photo, "-o", os.fsdecode(b"x\xff"), *HERE, code=2)
    assert sorted(os.listdir(tmp_path / "full")) == ["thesis.tex"]


def test_what_comes_before_the_images_is_told_too(monkeypatch):
    said = []
    lines = progress.Lines()
    monkeypatch.setattr(lines, "say", said.append)
    for told in (
        Progress(None, 10_000, doing="listing"),
        Progress(128, 0, doing="calibrating"),
        Progress(128, 1, doing="calibrating"),  # so soon after the last line
        Progress(128, 0, 0, 2),
    ):
        lines.show(told)
    assert said == [
        "listing: 10,000 images so far",
        "calibrating: 0 images of 128",
        "0 of 128 images (0%), 0 failed, 2 workers",
    ]


def test_the_time_that_is_left_is_that_of_what_is_left(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = progress.Lines()
    monkeypatch.setattr(lines, "say", said.append)
    for now[0], done in ((100.0, 600), (110.0, 800), (220.0, 1800)):  # 10 images/s
        lines.show(Progress(3000, done, 1, 2))
    assert said[0] == "600 of 3,000 images (20%), 1 failed, 2 workers"
    (second,) = said[1:]
    assert second == "1,800 of 3,000 images (60%), 10.0 images/s, 2 min left, 1 failed, 2 workers"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_an_output_without_permission(one_photo, tmp_path, command):
    """As user nobody, in a process that has read its libraries while it was still root."""
    (tmp_path / "locked").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    script = tmp_path / "as_nobody.py"
    script.write_text(
        "import os; from resfeat import extraction; from resfeat.backbones import weights\n"
        "import resfeat.engines.inline, resfeat.backbones.ours, resfeat.runtimes.openvino\n"
        "import torch._dynamo; from resfeat.cli import main\n"
        "os.setgid(65534); os.setuid(65534); main()\n"
    )
    done = command("extract", one_photo, "-o", tmp_path / "locked" / "out", *HERE, script=script)
    line = one_line(done, 1)
    assert f"cannot write to {tmp_path}/locked/out: Permission denied" in line
    assert os.listdir(tmp_path / "locked") == []


def test_a_count_that_is_none(one_photo, tmp_path, resfeat):
    done = resfeat("extract", one_photo, "-o", tmp_path / "out", *HERE, "--workers", "many")
    assert done.returncode == 2 and "neither a number nor auto" in done.stderr


def test_what_is_printed(one_photo, tmp_path, command, resfeat):
    quiet = command("extract", one_photo, "-o", tmp_path / "a", *HERE, "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")

    lines = resfeat("extract", one_photo, "-o", tmp_path / "b", *HERE, "--verbose")
    assert "0 of 1 images (0%)" in lines.stderr
    assert "This run: 1 images" in lines.stdout and "images/s" in lines.stdout
    assert "Busy seconds" in lines.stdout and "batch_size 16" in lines.stdout
    assert lines.stdout.splitlines()[-1].startswith("Finished: 1 embedded and 0 failed of 1")

    as_json = resfeat("extract", one_photo, "-o", tmp_path / "c", *HERE, "--log-json")
    events = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert all(event.pop("time") for event in events)
    assert events[0] == {"event": "step", "text": "starting"}
    first = next(event for event in events if event["event"] == "progress")
    assert first == {"event": "progress", "total": 1, "done": 0, "failed": 0, "workers": 1,
                     "doing": "embedding", "images_per_second": None}  # fmt: skip
    assert (events[-1]["event"], events[-1]["embedded"]) == ("report", 1)


def test_a_step_is_told_once_it_has_taken_a_moment(monkeypatch, capsys):
    monkeypatch.setattr(progress, "STEP_SECONDS", 0.1)
    with progress.Lines() as lines:
        lines.step("listing \x1b[2J")
        lines._step.join(60)  # until it is told
        monkeypatch.setattr(progress, "STEP_SECONDS", 1.0)
        lines.step("blinking")
        lines.show(Progress(10, 0, 0, 1))
        lines.step("the last one")
    time.sleep(1.2)
    assert capsys.readouterr().err.splitlines() == [
        "listing \\x1b[2J ...", "0 of 10 images (0%), 0 failed, 1 workers",
    ]  # fmt: skip


def stderr_at_the_first_step(photo, output, body):
    """What the command, a process of its own, prints if it does this and ends at its first step."""
    program = (
        "import sys, warnings; from resfeat.cli import main, progress\n"
        f"def told(self, text):\n{indent(body, ' ')}\n raise SystemExit(0)\n"
        "progress.Lines.step = told\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "extract", photo, "-o", output]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True).stderr


def test_something_is_told_before_anything_heavy_is_imported(one_photo, tmp_path):
    body = "print(sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)), file=sys.stderr)"
    assert stderr_at_the_first_step(one_photo, tmp_path / "out", body).strip() == "[]"


def test_what_ray_brings_along_says_nothing_of_what_it_lacks(one_photo, tmp_path):
    body = (
        "for module in 'urllib3.contrib.socks', 'another':\n"
        "    warnings.warn_explicit(module, UserWarning, 'file.py', 1, module)"
    )
    told = stderr_at_the_first_step(one_photo, tmp_path / "out", body)
    assert told.splitlines() == ["file.py:1: UserWarning: another"]


@pytest.mark.parametrize("words", ["", "sys.argv[1:]"], ids=["as a command", "called"])
def test_a_run_is_titled_by_its_dataset(words, one_photo):
    """And by no other argument, which may hold secrets. A process that calls it keeps its own."""
    program = (
        "import pathlib, sys; from resfeat.cli import main, progress\n"
        "def told(self, text):\n"
        "    line, name = (pathlib.Path('/proc/self', file).read_text() for file in files)\n"
        "    raise SystemExit(repr((line.rstrip('\\0'), name.rstrip())))\n"
        "files = 'cmdline', 'comm'\n"
        "progress.Lines.step = told\n"
        f"main({words})"
    )
    output = "s3://me:planted@bucket/out"
    weights = "https://me:planted@host.invalid/w.pth?sig=planted"
    command = [sys.executable, "-c", program, "extract", one_photo, "-o", output,
               "--weights", weights]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    line, name = ast.literal_eval(done.stderr)
    if words:
        assert line.startswith(sys.executable) and line.endswith(weights)
    else:
        assert (line, name) == ("resfeat-extract s3://bucket/out", "resfeat-extract")


def test_extract_leaves_pandas_alone(one_photo, tmp_path):
    """pyarrow would import it, which takes half a second."""
    program = (
        "import sys; from resfeat.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally:\n"
        "    print({'pyarrow', 'pandas'} & set(sys.modules))\n"
        "    import pandas"  # whoever wants it still can
    )
    arguments = ["extract", one_photo, "-o", tmp_path / "out", *HERE]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "{'pyarrow'}" and "Traceback" not in done.stderr


def test_python_looks_for_garbage_again_once_torch_is_there(one_photo, tmp_path):
    """While it is imported there is none, and half a million objects to go over; later, too, but
    for those that came since."""
    program = (
        "import gc, sys; from resfeat.cli import main\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch': sys.exit(print(gc.isenabled()))\n"
        "sys.meta_path.insert(0, Finder)\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    arguments = ["extract", one_photo, "-o", tmp_path / "out", *HERE]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "True", "True"]


def test_a_current_folder_that_was_deleted_is_one_line(one_photo, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {sys.executable} -m resfeat extract photos -o out"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "the folder that you are in was deleted" in one_line(done, 2)


def test_status_without_the_reports_of_runs(one_photo, tmp_path, resfeat):
    resfeat("extract", one_photo, "-o", tmp_path / "out", *HERE)
    shutil.rmtree(tmp_path / "out" / "_resfeat" / "runs")
    status = json.loads(resfeat("status", tmp_path / "out", "--json").stdout)
    assert (status["embedded"], status["runs"]) == (1, 0)


def test_a_bar_on_a_terminal(one_photo, tmp_path):
    """Run under a pseudo-terminal, as a person would."""
    command = [sys.executable, "-m", "resfeat", "extract", one_photo, "-o", tmp_path / "out", *HERE]
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(list(map(str, command)), stdout=slave, stderr=slave)
    os.close(slave)
    told = b""
    try:
        while block := os.read(master, 4096):
            told += block
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert b"embedding:" in told and b"1/1" in told and b"failed=0, workers=1" in told


def test_status(one_photo, tmp_path, resfeat):
    resfeat("extract", one_photo, "-o", tmp_path / "out", *HERE)
    status = json.loads(resfeat("status", tmp_path / "out", "--json").stdout)
    assert (status["images"], status["embedded"], status["failed"]) == (1, 1, 0)
    assert status["complete"] is True and status["writer"] is None and status["runs"] == 1
    assert "complete          yes" in resfeat("status", tmp_path / "out").stdout
    assert "no resfeat dataset" in one_line(resfeat("status", tmp_path), 2)
    spec = tmp_path / "out" / "_resfeat" / "spec.json"
    other = json.loads(spec.read_text())
    other["identity"]["pool"] = "max"  # the parts would seem to be another dataset's
    for damaged in ("[]", '{"format": 1}', "{", json.dumps(other)):
        spec.write_text(damaged)
        assert "spec.json" in (line := one_line(resfeat("status", tmp_path / "out"), 1)) or (
            "another version" in line
        )
