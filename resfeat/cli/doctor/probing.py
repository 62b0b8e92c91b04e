"""Probes: run at the same time, none for longer than it may, and nothing that breaks ends the rest.

What may crash or hang (a library, a folder on a network, a store) is looked at in a process of its
own, which costs its finding and nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from threading import BoundedSemaphore, Thread
from typing import Any, Literal

from resfeat.errors import ResfeatError, first_line, public_text

# Until a probe is given up: imports take long on a busy machine, or from a disk on a network.
PROBE_SECONDS = 120.0
# Processes at a time: more would only make each other late.
_turn = BoundedSemaphore(max(2, os.cpu_count() or 1))
# For a store or a cluster to answer, once the libraries are imported.
ANSWER_SECONDS = 8

State = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what is there, and what that means or what to do about it.

    state: "broken" is what keeps `extract` from working here; "note" is worth a look. value: what
    is there, for programs.
    """

    what: str
    found: str
    verdict: str = ""
    state: State = "ok"
    value: Any = None


@dataclass(frozen=True)
class Probe:
    """A function that gives findings. apart: in a process of its own, so the arguments are plain.
    mend, state: what its finding says where it comes to no end."""

    what: str
    look: Callable[..., list[Finding]]
    arguments: tuple[Any, ...] = ()
    apart: bool = False
    mend: str = "reinstall resfeat: pip install -c constraints.txt ."
    state: State = "broken"
    seconds: float | None = None

    def failed(self, found: str) -> list[Finding]:
        return [Finding(self.what, found, self.mend, self.state)]


def run(probes: Sequence[Probe]) -> list[Finding]:
    """The findings of all, in their order, without secrets."""
    futures = []
    for probe in probes:
        futures.append(Future[list[Finding]]())
        # Python does not wait for such a thread when it ends.
        Thread(target=_run, args=(probe, futures[-1]), daemon=True).start()
    found = [each for future in futures for each in future.result()]
    return [_public(each) for each in found]


def _public(finding: Finding) -> Finding:
    what, found, verdict = map(public_text, (finding.what, finding.found, finding.verdict))
    return replace(finding, what=what, found=found, verdict=verdict)


def _run(probe: Probe, future: Future[list[Finding]]) -> None:
    try:
        found = _apart(probe) if probe.apart else probe.look(*probe.arguments)
    except Exception as error:  # whatever a broken library raises
        found = probe.failed(said(error))
    future.set_result(found)


def said(error: Exception) -> str:
    if isinstance(error, ResfeatError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _apart(probe: Probe) -> list[Finding]:
    """What a probe finds in a process of its own, which imports from where this one does."""
    given = json.dumps([probe.look.__module__, probe.look.__name__, *probe.arguments])
    seconds = probe.seconds or PROBE_SECONDS
    try:
        with _turn:
            done = subprocess.run(
                [sys.executable, "-P", "-m", __name__, given],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
            )
    except subprocess.TimeoutExpired:
        return probe.failed(f"no answer within {seconds:g} s")
    if done.returncode == -signal.SIGALRM:
        return probe.failed(f"no answer within {ANSWER_SECONDS} s")
    if done.returncode < 0:
        return probe.failed(f"crashes with {signal.Signals(-done.returncode).name}")
    try:
        told = json.loads(done.stdout)
    except ValueError:
        return probe.failed(f"ends Python with exit code {done.returncode}")
    return probe.failed(told) if isinstance(told, str) else [Finding(**each) for each in told]


def must_answer_soon() -> None:
    """End this process, which is one probe's own, if what follows takes long. Libraries that wait
    for the network heed nothing milder."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(ANSWER_SECONDS)


def _answer() -> None:
    """Be the process of a probe: print its findings, or a text where it came to none."""
    module, name, *arguments = json.loads(sys.argv[1])
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    told: Any
    try:
        look = getattr(importlib.import_module(module), name)
        told = [asdict(each) for each in look(*arguments)]
    except Exception as error:
        told = said(error)
    answer.write(json.dumps(told))
    answer.flush()
    os._exit(0)  # before libraries clean up, which may hang


if __name__ == "__main__":
    _answer()
