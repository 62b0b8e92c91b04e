"""Have a subprocess do what no user can make it do: die between two steps, crash on one image."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Mapping
from pathlib import Path

# Run after "resfeat.dataset.commit": the process kills itself at the step that KILL_AT names.
KILL_AT_STEP = """
import os, signal

def on_step(step):
    if step == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
"""

# Run after "resfeat.decoding.decode": images that do to the decoder what a hostile one might.
TREACHEROUS = """
import os, signal, time

without = _decode

def _decode(data, *rest):
    if data.endswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"exit"):
        os._exit(3)
    if data.endswith(b"hang"):
        time.sleep(3600)
    if data.endswith(b"spin"):
        while True:
            pass
    if data.endswith(b"swallow"):
        bytearray(6 * 1024**3)
    return without(data, *rest)
"""

# Run after "resfeat.decoding.decode": as if images were large. A run then lasts long enough for
# what is done to it on its way, and takes no core from other tests meanwhile.
UNHURRIED = """
import time

without = _decode

def _decode(data, *rest):
    time.sleep(0.01)
    return without(data, *rest)
"""

# Python imports a module of this name by itself, before anything else.
_SITECUSTOMIZE = """
import sys

SOURCES = {sources!r}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in SOURCES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec:
            load = spec.loader.exec_module

            def load_and_run(module):
                load(module)
                exec(compile(SOURCES[name], f"<after {{name}}>", "exec"), vars(module))

            spec.loader.exec_module = load_and_run
        return spec


sys.meta_path.insert(0, Finder())
"""


def after_import(sources: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment of a Python, and of those that it starts, in which source is run inside a
    module as soon as that is imported, before whoever imports it sees it.

    sources: Python source by name of the module. Its functions and its constants must replace
        some that are there: a seam that was renamed would be a test that tests nothing.
    folder: to write the hook into; one for each hook.
    """
    for name, source in sources.items():
        module = importlib.import_module(name)
        missing = [each for each in _replaced(source) if not hasattr(module, each)]
        if missing:
            raise AttributeError(f"{name} has no {', '.join(missing)}: where did the seam go?")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(sources=dict(sources)))
    path = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _replaced(source: str) -> list[str]:
    """Names of the functions and the constants that source defines."""
    names = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef):
            names.append(statement.name)
        else:
            given = (each for each in ast.walk(statement) if isinstance(each, ast.Name))
            names += [each.id for each in given if type(each.ctx) is ast.Store if each.id.isupper()]
    return names
