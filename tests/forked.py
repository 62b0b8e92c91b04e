"""The command in a process of its own, forked off one that has imported torch: a real process, four
seconds sooner than one that begins with Python."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

# Nothing of resfeat's, which a hook (seams.py) may change while it is imported, and not Ray, which
# reads the environment then.
PRELOADED = ["torch", "pyarrow.parquet", "pyarrow.fs", "PIL.Image", "safetensors.torch", "click",
             "obstore", "pandas", "simplejpeg", "tenacity", "urllib3"]  # fmt: skip


def start(
    *arguments: object, env: Mapping[str, str] | None = None, script: Path | None = None
) -> Process:
    """The command under way, or a script of Python."""
    return Process(arguments, dict(os.environ if env is None else env), script)


class Process:
    """What `subprocess.Popen` has of it."""

    def __init__(
        self, arguments: Iterable[object], env: dict[str, str], script: Path | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._texts = [Path(self._folder.name, name) for name in ("out", "err")]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        about = list(map(str, arguments)), os.getcwd(), env, self._texts, script
        self._process = context.Process(target=_run, args=about)
        self._process.start()
        self.pid: int = self._process.pid or 0
        self.kill, self.terminate = self._process.kill, self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("resfeat", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and give what it wrote to standard output and error."""
        self.wait(timeout)
        out, err = (text.read_text(errors="backslashreplace") for text in self._texts)
        return out, err


def _run(
    words: list[str], folder: str, env: dict[str, str], texts: list[Path], script: Path | None
) -> None:
    for number, text in enumerate(texts, start=1):
        os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    # What Python does with it when it starts.
    for place in filter(None, env.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(0, place)
        if (hook := Path(place, "sitecustomize.py")).exists():
            runpy.run_path(str(hook))
    if script:
        sys.argv = [str(script), *words]
        runpy.run_path(str(script), run_name="__main__")
    from resfeat.cli import main

    main(words, prog_name="resfeat")
