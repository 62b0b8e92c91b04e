"""The tests' own tools: a hook that would change nothing is an error, and the command in this
process gives what a process gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from command import call, error_of
from seams import after_import


def test_a_hook_is_run_inside_its_module(tmp_path):
    hook = after_import({"resfeat.errors": "REASONS = ('changed',)"}, tmp_path / "hook")
    code = "import resfeat.errors; print(resfeat.errors.REASONS)"
    done = subprocess.run([sys.executable, "-c", code], env=hook, capture_output=True, text=True)
    assert done.stdout == "('changed',)\n", done.stderr


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("resfeat.nowhere", "SECONDS = 1", "resfeat.nowhere"),
        ("resfeat.errors", "def on_step(step):\n    pass", "resfeat.errors has no on_step"),
        ("resfeat.errors", "SECONDS = 1", "resfeat.errors has no SECONDS"),
        ("resfeat.errors", "SECONDS: float = 1", "resfeat.errors has no SECONDS"),
    ],
)
def test_a_hook_that_would_change_nothing_is_an_error(module, source, says, tmp_path):
    with pytest.raises((ImportError, AttributeError), match=says):
        after_import({module: source}, tmp_path / "hook")


@pytest.mark.parametrize(
    "words",
    [["--version"], ["status", "nowhere"], ["extract", "nowhere", "-o", "out"], ["extract", "-o"]],
)
def test_the_command_here_is_that_of_a_process(words, command):
    here, there = call(*words), command(*words)
    assert here.returncode == there.returncode
    assert here.stdout == there.stdout
    assert here.stdout or error_of(here.stderr) == error_of(there.stderr)


def test_the_command_leaves_this_process_as_it_was(monkeypatch, capfd):
    from resfeat.cli import main

    def run(*_, **__):
        os.environ["LEFT_BEHIND"] = "1"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        torch.set_num_threads(1)
        os.write(2, b"from below Python\n")
        raise SystemExit(3)

    before = signal.getsignal(signal.SIGTERM), torch.get_num_threads(), os.environ.copy()
    monkeypatch.setattr(main, "main", run)
    done = call("status")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "from below Python\n")
    after = signal.getsignal(signal.SIGTERM), torch.get_num_threads(), os.environ.copy()
    assert after == before
    print("ours again")
    assert capfd.readouterr() == ("ours again\n", "")

    monkeypatch.setattr(main, "main", lambda *_, **__: os._exit(1))
    with pytest.raises(AssertionError, match="use `command`"):
        call("status")
    with pytest.raises(ValueError, match="use `command`"):
        call("status", env={"PYTHONPATH": "hook"})
