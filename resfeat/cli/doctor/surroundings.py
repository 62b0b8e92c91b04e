"""What this machine has, and what lies at the places that a run would read and write.

Nothing that may be broken is imported before a function runs.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from resfeat.cli.doctor.probing import ANSWER_SECONDS, Finding, State, must_answer_soon
from resfeat.cli.doctor.software import MODEL

GIB, MIB = 1 << 30, 1 << 20
LEAST_SPACE = 100 * MIB  # two or three parts of 4,096 embeddings
LITTLE_SPACE = GIB
LEAST_FILES = 1024
LEAST_MEMORY = 2 * GIB  # one process with ResNet-50 takes 1.3
LEAST_SHARED = GIB // 2  # the weights lie there, once for all workers of a machine


def cores() -> list[Finding]:
    from resfeat.runtimes.hardware import cpu_count

    usable, there = cpu_count(), os.cpu_count() or 1
    less = "affinity or the container's quota keeps the others" if usable < there else ""
    return [Finding("cores", f"{usable} of {there}", less, value=usable)]


def memory() -> list[Finding]:
    from resfeat.runtimes.hardware import memory_bytes

    usable = memory_bytes()
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found, state, verdict = f"{_size(usable)} of {_size(there)}", "ok", ""
    if usable < LEAST_MEMORY:
        state, verdict = "note", "ResNet-50 takes 1.3 GiB in each process: raise the limit"
    elif usable < there:
        verdict = "the container's limit keeps the rest"
    return [Finding("memory", found, verdict, state, usable)]  # type: ignore[arg-type]


def shared_memory() -> list[Finding]:
    if not os.path.isdir("/dev/shm"):
        return [Finding("/dev/shm", "none", "Ray takes its temporary folder", "note")]
    size = shutil.disk_usage("/dev/shm").total
    if size < LEAST_SHARED:
        verdict = "Ray takes slower disk instead: docker run --shm-size 2g, or --workers 0"
        return [Finding("/dev/shm", _size(size), verdict, "note", size)]
    return [Finding("/dev/shm", _size(size), value=size)]


def open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{_limit(soft)}, at most {_limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        verdict = f"many workers and web readers need more: ulimit -n {LEAST_FILES}"
        return [Finding("open files", told, verdict, "note", soft)]
    return [Finding("open files", told, value=soft)]


def _limit(count: int) -> str:
    return "any number" if count == resource.RLIM_INFINITY else f"{count:,}"


def temporary_folder() -> list[Finding]:
    return [_space("temporary folder", Path(tempfile.gettempdir()), "set TMPDIR to another")]


def weights(fetch: bool) -> list[Finding]:
    """The cache of published weights, where torch keeps it: whether the default ones are there."""
    from resfeat.backbones import find
    from resfeat.backbones.torchvision import file_of

    family, name = find(MODEL)
    default = next(iter(family.published(name).values()))
    if fetch:
        default.read()
    file = file_of(name, default.name)
    folder = file.parent
    there = sorted(path.name for path in folder.glob("*.pth"))
    if file.is_file():
        return [Finding("weights", f"{file.name} in {folder}", value=there)]
    found = f"no {file.name} in {folder}"
    if not _may_write(_nearest(folder)):
        verdict = "it cannot be written: set TORCH_HOME, or give --weights FILE"
        return [Finding("weights", found, verdict, "broken", there)]
    verdict = "the first run downloads them: resfeat doctor --fetch tries it, or give --weights"
    return [Finding("weights", found, verdict, "note", there)]


# What is said of a place in a store to write to: to try that would leave something there.
UNTRIED = "fine as OUT if it may be written, which was not tried"


def source(name: str, alone: bool) -> list[Finding]:
    """A place to read from. alone: no output was named, so this may be one."""
    from resfeat.sources import places
    from resfeat.storage import is_remote
    from resfeat.storage.web import is_web

    if is_remote(name) or is_web(name):
        return _distant(name, nothing="fine as OUT, but as SRC" if alone else "")
    is_dataset, is_there = os.path.isdir(Path(name, "_resfeat")), os.path.lexists(name)
    if alone and is_dataset:
        return out(name)
    if alone and not (is_there or set("*?[") & set(name)):
        found = out(name)
        if found[0].state == "broken":
            return found
        return [replace(found[0], state="note", verdict="fine as OUT, but as SRC check the name")]
    places.check(name)
    if os.path.exists(name) and not os.access(name, os.R_OK):
        return [Finding(name, "there, but not to be read", "check its rights", "broken")]
    return [Finding(name, "there, and can be read")]


def out(name: str) -> list[Finding]:
    """A place to write to."""
    from resfeat.storage import is_remote
    from resfeat.storage.web import is_web

    if is_web(name):
        return [Finding(name, "on the web", "nothing can be written there: see -o", "broken")]
    if is_remote(name):
        return _distant(name, nothing=UNTRIED)
    path = Path(name).absolute()
    return [_space(name, path, "give another -o")]


def _distant(name: str, nothing: str) -> list[Finding]:
    """An address in a store or on the web. nothing: the verdict where nothing is there; empty if
    something is needed."""
    from resfeat.storage.reach import reach

    must_answer_soon()
    if reach(name, ANSWER_SECONDS / 2):
        return [Finding(name, "answers, and something is there")]
    if nothing == UNTRIED:
        return [Finding(name, "answers, and nothing is there yet", nothing)]
    state: State = "note" if nothing else "broken"
    verdict = f"{nothing} check the name".strip()
    return [Finding(name, "answers, and nothing is there", verdict, state)]


def _space(what: str, path: Path, otherwise: str) -> Finding:
    """Whether a folder, or the one in which it would be made, can be written and has room."""
    from resfeat.storage import file_system_of

    folder = _nearest(path)
    free = shutil.disk_usage(folder).free
    there = "" if folder == path else f"not there yet, to be made in {folder}; "
    found = f"{there}{_size(free)} free ({file_system_of(folder)})"
    if path.exists() and not path.is_dir():
        return Finding(what, "a file", "give a folder", "broken")
    if not _may_write(folder):
        return Finding(what, f"{folder} cannot be written", otherwise, "broken")
    if free < LEAST_SPACE:
        return Finding(what, found, f"too little: make room, or {otherwise}", "broken", free)
    state: State = "note" if free < LITTLE_SPACE else "ok"
    little = "little: a million embeddings of ResNet-50 take 8 GiB" if state == "note" else ""
    return Finding(what, found, little, state, free)


def _nearest(path: Path) -> Path:
    """The path, or the first above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def _may_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _size(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.0f} MiB"
