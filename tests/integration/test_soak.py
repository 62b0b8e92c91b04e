"""An hour of runs that are killed at random moments: every dataset ends as if none had been.

SOAK_MINUTES=60 SOAK_SEED=1 SOAK_REPORT=soak.md python -m pytest -m soak -s
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from broken import write_broken
from integration.test_resume import title
from tables import rows

from resfeat.dataset import Layout

PHOTOS = 150
# Whole batches, of whatever size: an image keeps its place in its batch, and with it its bits.
SHARD_SIZES = (8, 16, 24, 32, 40)
WORKERS = (0, 1, 2)
FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "worker killed")
MOST_FAULTS = 4  # to a dataset; the run after them is left alone
LATEST_FAULT = 10.0  # seconds from its beginning, and many runs have ended by then
ORPHAN_SECONDS = 30.0
# Ray's idle agents, which do nothing of ours, look for their parent once in a while only.
AGENT_SECONDS = 120.0
RUN_SECONDS = 600.0
GROWTH = 1.5
# Open files that a driver may have more than another: of children, where it goes on from a kill.
CHILDREN = 16


@pytest.fixture(scope="module")
def source(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    for photo in sorted(photos.rglob("*.*"))[::3][:PHOTOS]:
        os.link(photo, folder / f"{photo.parent.name}-{photo.name}")
    write_broken(folder)
    return folder


@dataclass
class Peak:
    """The most that a driver took while it ran."""

    rss: int = 0
    handles: int = 0


@dataclass
class Counts:
    """What the hour came to."""

    runs: int = 0
    datasets: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    differing: int = 0
    unverified: int = 0
    orphans: int = 0
    leftovers: int = 0
    # Of the drivers that finished a dataset, by the number of their workers, in order.
    peaks: dict[int, list[Peak]] = field(default_factory=dict)

    def growth(self, workers: int) -> tuple[Peak, Peak]:
        """The peak of the first third of these drivers, and that of the last third."""
        peaks = self.peaks[workers]
        third = max(1, len(peaks) // 3)
        return _highest(peaks[:third]), _highest(peaks[-third:])

    def table(self, minutes: float, seed: int) -> str:
        faults = ", ".join(f"{self.faults[kind]} {kind}" for kind in FAULTS)
        grown = [self.growth(workers) for workers in sorted(self.peaks)]
        rss = ", ".join(f"{a.rss / 2**20:.0f} → {b.rss / 2**20:.0f}" for a, b in grown)
        handles = ", ".join(f"{a.handles} → {b.handles}" for a, b in grown)
        workers = ", ".join(map(str, sorted(self.peaks)))
        lines = [
            ("minutes (seed)", f"{minutes:.0f} ({seed})"),
            ("datasets finished", f"{self.datasets:,}"),
            ("runs", f"{self.runs:,}"),
            ("faults", faults),
            ("rows lost, doubled, differing", f"{self.lost}, {self.doubled}, {self.differing}"),
            ("datasets that `resfeat verify` found wrong", f"{self.unverified}"),
            (f"peak RSS in MiB of drivers with {workers} workers, first → last third", rss),
            (f"open files of drivers with {workers} workers, first → last third", handles),
            ("processes left after their driver", f"{self.orphans}"),
            ("files left in `_resfeat/tmp`", f"{self.leftovers}"),
        ]
        body = "".join(f"| {name} | {value} |\n" for name, value in lines)
        return f"| what | count |\n| --- | --- |\n{body}"


def _highest(peaks: list[Peak]) -> Peak:
    return Peak(max(peak.rss for peak in peaks), max(peak.handles for peak in peaks))


class Run:
    """One driver: watched while it runs, with at most one fault, and without heirs."""

    def __init__(self, command: list[str], environment: dict[str, str], layout: Layout) -> None:
        self._layout = layout
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self._driver = psutil.Process(self._process.pid)
        self.peak = Peak()
        self.below: set[psutil.Process] = set()
        self.fault: str | None = None

    def disturb(self, fault: str | None, after: float) -> tuple[int, str]:
        """Let it run to its end, and do this to it once so many seconds have passed. Gives its exit
        code and what it said."""
        began = time.monotonic()
        while self._process.poll() is None:
            self._look()
            passed = time.monotonic() - began
            if fault and not self.fault and passed > after and self._injected(fault):
                self.fault = fault
            if passed > RUN_SECONDS:
                self._process.kill()
                raise AssertionError(f"hangs: {self._process.communicate()[0]}")
            time.sleep(0.1)
        return self._process.returncode, self._process.communicate()[0]

    def orphans(self) -> int:
        """How many of its processes are there when all should have gone."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while left := [each for each in self._left() if not title(each).endswith("Agent")]:
            if time.monotonic() > deadline:
                print("left behind:", [title(each) for each in left])
                return len(left)
            time.sleep(0.2)
        return 0

    def _left(self) -> list[psutil.Process]:
        return [each for each in self.below if each.is_running()]

    def _look(self) -> None:
        try:
            self.below.update(self._driver.children(recursive=True))
            self.peak.rss = max(self.peak.rss, self._driver.memory_info().rss)
            self.peak.handles = max(self.peak.handles, self._driver.num_fds())
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            pass

    def _injected(self, fault: str) -> bool:
        if fault == "worker killed":
            ours = "ray::resfeat-worker-"
            workers = [each for each in self.below if title(each).startswith(ours)]
            if workers:
                random.choice(workers).kill()
            return bool(workers)
        # Before it holds the lock it does not mind a signal yet; being killed can happen any time.
        if fault != "SIGKILL" and not self._holds_the_lock():
            return False
        self._look()
        self._process.send_signal(signal.Signals[fault])
        return True

    def _holds_the_lock(self) -> bool:
        try:
            return f'"pid": {self._process.pid},' in self._layout.lock.read_text()
        except FileNotFoundError:
            return False


# A signal that comes when all is done finds the run finished, or Python on its way out.
ENDINGS = {
    None: {0},
    "SIGKILL": {0, -signal.SIGKILL},
    "SIGTERM": {0, 128 + signal.SIGTERM, -signal.SIGTERM},
    "SIGINT": {0, 128 + signal.SIGINT, -signal.SIGINT},
    "worker killed": {0},
}


def finish(source, output, choices, number, counts, chance):
    """Extract into a fresh dataset, again and again until it is finished."""
    workers, size = WORKERS[number % len(WORKERS)], SHARD_SIZES[number % len(SHARD_SIZES)]
    command = [sys.executable, "-m", "resfeat", "extract", source, "-o", output, *choices,
               "--workers", workers, "--shard-size", size, "--max-error-rate", 1]  # fmt: skip
    kinds = FAULTS if workers else FAULTS[:-1]
    faults = [chance.choice(kinds) for _ in range(chance.randint(1, MOST_FAULTS))]
    lingering = []
    # The paths of Ray's sockets may have 107 bytes.
    ray_folder = Path(tempfile.mkdtemp(dir="/tmp"))
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder)}
    try:
        for fault in [*faults, None]:
            run = Run(list(map(str, command)), environment, Layout(output))
            code, said = run.disturb(fault, chance.uniform(0, LATEST_FAULT))
            counts.runs += 1
            counts.faults[run.fault] += run.fault is not None
            assert code in ENDINGS[run.fault], (run.fault, code, said)
            assert "Traceback" not in said, said
            counts.orphans += run.orphans()
            lingering.append((time.monotonic() + AGENT_SECONDS, run))
            if code == 0:
                counts.peaks.setdefault(workers, []).append(run.peak)
                break
        for deadline, run in lingering:
            while run._left() and time.monotonic() < deadline:
                time.sleep(0.2)
            counts.orphans += len(run._left())
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    assert code == 0
    counts.datasets += 1


def compare(output, undisturbed, counts):
    expected, there = everything(undisturbed), everything(output)
    ids = Counter(row["id"] for row in there)
    counts.doubled += sum(count - 1 for count in ids.values())
    wanted = {row["id"]: row for row in expected}
    counts.lost += len(wanted.keys() - ids.keys())
    counts.differing += sum(row != wanted.get(row["id"]) for row in there)


def everything(output):
    """Every row of a dataset with all that it holds, embedded or failed."""
    return [*rows(output).to_pylist(), *rows(output, "failures").to_pylist()]


@pytest.mark.soak
def test_an_hour_of_kills_loses_nothing(source, choices, resfeat, tmp_path):
    minutes = float(os.environ.get("SOAK_MINUTES", "60"))
    seed = int(os.environ.get("SOAK_SEED", random.randrange(1_000_000)))
    print(f"SOAK_SEED={seed}")
    chance = random.Random(seed)
    random.seed(seed)

    undisturbed = tmp_path / "undisturbed"
    counts = Counts()
    done = resfeat("extract", source, "-o", undisturbed, *choices, "--workers", 0,
                   "--max-error-rate", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = time.monotonic()
    while time.monotonic() - started < 60 * minutes:
        output = tmp_path / f"{counts.datasets:05d}"
        finish(source, output, choices, counts.datasets, counts, chance)
        compare(output, undisturbed, counts)
        verified = resfeat("verify", output)
        if verified.returncode:
            print(verified.stdout, verified.stderr)
            counts.unverified += 1
        counts.leftovers += len(list(Layout(output).tmp.iterdir()))
        shutil.rmtree(output)

    table = counts.table((time.monotonic() - started) / 60, seed)
    print(table)
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(table, encoding="utf-8")
    assert counts.datasets and counts.faults.total()
    assert (counts.lost, counts.doubled, counts.differing, counts.unverified) == (0, 0, 0, 0)
    assert (counts.orphans, counts.leftovers) == (0, 0)
    for workers in counts.peaks:
        first, last = counts.growth(workers)
        assert last.rss <= GROWTH * first.rss, (workers, first, last)
        assert last.handles <= GROWTH * first.handles + CHILDREN, (workers, first, last)
