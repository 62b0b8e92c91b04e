"""The command, called in this process: seconds faster than one that has to import torch first."""

from __future__ import annotations

import io
import itertools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, NoReturn

import click
import torch

from resfeat.cli import main
from resfeat.storage import remote

Done = subprocess.CompletedProcess


def call(
    *arguments: object, env: Mapping[str, str] | None = None, program: click.Command = main
) -> Done[str]:
    """Run the command here, or another program of Click's, and give what a finished process gives.

    An extract with workers runs on a Ray that stays for the session. What a run changes in its
    process is changed back. An exception that the command does not turn into a line is raised.

    env: variables to add while it runs. A hook (seams.py) needs a process of its own.
    """
    words = [str(word) for word in arguments]
    if "PYTHONPATH" in (env or {}):
        raise ValueError("PYTHONPATH does nothing to a process that runs already: use `command`")
    with _restored(), _captured() as read:
        if _has_workers(words):
            share_ray()
        os.environ.update(env or {})
        remote.store.cache_clear()  # its clients have the variables of another test
        try:
            program(words, prog_name="resfeat")
        except SystemExit as left:
            code = left.code
    return Done(words, code or 0, *read())


def error_of(stderr: str) -> str:
    """The one line of an error. Steps that take a moment are told before it, as `loading ...`."""
    (line,) = (each for each in stderr.splitlines() if each and not each.endswith(" ..."))
    return line


def share_ray() -> None:
    """Start the Ray that runs in this process share, unless one is running."""
    import ray

    if not ray.is_initialized():
        cpus = len(os.sched_getaffinity(0))
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)


def end_ray() -> None:
    """End it: before a test that needs a Ray of another shape, and at the end of the session."""
    if ray := sys.modules.get("ray"):
        ray.shutdown()


def _has_workers(words: list[str]) -> bool:
    """Whether this is an extract by Ray workers on this machine."""
    given = [after for word, after in itertools.pairwise(words) if word == "--workers"]
    return any(each == "auto" or each.strip("0").isdigit() for each in given[-1:])


@contextmanager
def _restored() -> Iterator[None]:
    """Afterwards environment, signal handlers, warnings and torch's threads are as before. Ending
    the process would end the tests with it, so that is an error here."""
    environment, leave = dict(os.environ), os._exit
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    try:
        os._exit = _refuse
        with warnings.catch_warnings():
            yield
    finally:
        os._exit = leave
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)


def _refuse(code: int) -> NoReturn:
    raise AssertionError(
        f"a thread hangs, and the command ends its process ({code}): use `command`"
    )


@contextmanager
def _captured() -> Iterator[object]:
    """Catch what Python and the libraries below it write to standard output and error. Gives a
    function that returns both as text, to be called afterwards."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = sys.stdout, sys.stderr
        for stream in streams:
            stream.flush()
        saved = os.dup(1), os.dup(2)
        try:
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = _text(1, "strict"), _text(2, "backslashreplace")
            yield lambda: texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, before in zip((1, 2), saved, strict=True):
                os.dup2(before, number)
                os.close(before)
            texts += map(_read, (out, err))


def _text(number: int, errors: str) -> io.TextIOWrapper:
    return open(number, "w", encoding="utf-8", errors=errors, buffering=1, closefd=False)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return io.TextIOWrapper(io.BytesIO(file.read()), encoding="utf-8").read()
