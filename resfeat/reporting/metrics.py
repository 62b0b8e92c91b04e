"""A run in Prometheus' text format, in a file, as node_exporter's textfile collector takes it.

The file is replaced by a rename, a few seconds apart while a run goes on. What it says of the last
run stays until the next has ended, and when one last went well stays whatever follows.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from resfeat.errors import REASONS, UsageError
from resfeat.plan import Partition
from resfeat.storage import locate, public
from resfeat.storage.draft import DiskDraft

if TYPE_CHECKING:
    from resfeat.reporting.report import Report
    from resfeat.reporting.tally import Progress

SECONDS_BETWEEN_WRITES = 5.0

# All are gauges: a run's figures begin at nought with each run, and the dataset's may fall.
# The dataset, or the partition that the run does.
DATASET = {
    "resfeat_images": "Images that are listed.",
    "resfeat_images_done": "Images that have a row: an embedding or a failure.",
    "resfeat_images_embedded": "Images that have an embedding, when the last run ended.",
    "resfeat_images_failed": "Images that gave no embedding, when the last run ended.",
    "resfeat_shards_left": "Shards that were not done when the last run ended.",
}
# What the last run did, known once it has ended.
LAST_RUN = {
    "resfeat_run_images": "Images that the last run did, in shards that it committed.",
    "resfeat_run_images_failed": "Of these, images that gave no embedding.",
    "resfeat_run_shards": "Shards that the last run committed.",
    "resfeat_run_read_bytes": "Bytes of images that the last run read.",
    "resfeat_run_start_up_seconds": "From the start of the last run to its first live worker.",
    "resfeat_run_seconds": "From the first live worker of the last run to its last commit.",
    "resfeat_run_stage_seconds": "Busy seconds by stage, over all threads of all workers.",
    "resfeat_run_worker_deaths": "Workers that died in the last run and were replaced.",
}
STATE = {
    "resfeat_run_active": "1 while a run goes on; stays 1 if that is killed.",
    "resfeat_run_workers": "Live workers of the run that goes on.",
    "resfeat_run_start_timestamp_seconds": "When the last run started.",
    "resfeat_run_end_timestamp_seconds": "When the last run that ended did so.",
    "resfeat_run_exit_code": "Exit code of the last run that ended.",
    "resfeat_last_success_timestamp_seconds": "When a run last ended with exit code 0.",
}
HELP = DATASET | LAST_RUN | STATE

Labels = Mapping[str, str]


class Metrics:
    """The file of a run. Of another run of the same output it takes over what still holds."""

    def __init__(self, file: str, output: str, partition: str | None) -> None:
        """Write down that a run has started. Raises UsageError where the file cannot be written."""
        self._file = Path(file).absolute()
        # Files of several datasets meet in one collector: each sample says whose it is.
        self._labels = {"output": public(str(locate(output)))}
        if partition is not None:
            self._labels["partition"] = str(Partition.parse(partition))
        self._samples = self._left_by_the_last()
        self._set("resfeat_run_active", 1)
        self._set("resfeat_run_start_timestamp_seconds", time.time())
        try:
            self._write()
            self._written = -math.inf  # where the run stands is told as soon as it is known
        except OSError as error:
            raise UsageError(
                f"cannot write --metrics {file} ({error.strerror}): name a file in a folder that "
                "is there and can be written"
            ) from error

    def show(self, progress: Progress) -> None:
        """Where the run stands; written down every few seconds."""
        if progress.doing != "embedding":
            return
        self._set("resfeat_images", progress.total or 0)
        self._set("resfeat_images_done", progress.done)
        self._set("resfeat_run_workers", progress.workers)
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            with suppress(OSError):  # of a disk that is full; it may have room again at the end
                self._write()

    def end(self, exit_code: int, report: Report | None) -> None:
        """How the run ended. report: of one that did not fail. Raises OSError."""
        now = time.time()
        self._set("resfeat_run_active", 0)
        self._set("resfeat_run_workers", 0)
        self._set("resfeat_run_end_timestamp_seconds", now)
        self._set("resfeat_run_exit_code", exit_code)
        if exit_code == 0:
            self._set("resfeat_last_success_timestamp_seconds", now)
        for name in LAST_RUN:  # that of the run before is not told as this one's
            self._samples.pop(name, None)
        if report:
            self._take(report)
        self._write()

    def _take(self, report: Report) -> None:
        self._set("resfeat_images", report.items)
        self._set("resfeat_images_done", report.embedded + report.failed)
        self._set("resfeat_images_embedded", report.embedded)
        # Every reason, so that one that has not come up yet is 0 and not unknown.
        reasons = dict.fromkeys(REASONS, 0) | dict(report.reasons)
        self._set_each("resfeat_images_failed", "reason", reasons)
        self._set("resfeat_shards_left", report.shards_left)
        self._set("resfeat_run_images", report.images)
        self._set("resfeat_run_images_failed", report.images_failed)
        self._set("resfeat_run_shards", report.shards)
        self._set("resfeat_run_read_bytes", report.bytes_read)
        self._set("resfeat_run_start_up_seconds", report.start_seconds)
        self._set("resfeat_run_seconds", report.seconds)
        self._set_each("resfeat_run_stage_seconds", "stage", report.stages)
        self._set("resfeat_run_worker_deaths", report.engine.get("worker_deaths", 0))

    def _set(self, name: str, value: float) -> None:
        self._samples[name] = [_sample(name, self._labels, value)]

    def _set_each(self, name: str, label: str, values: Mapping[str, float]) -> None:
        self._samples[name] = [
            _sample(name, {**self._labels, label: each}, value) for each, value in values.items()
        ]

    def _left_by_the_last(self) -> dict[str, list[str]]:
        """What the file says of the same output. One that is none of ours counts as empty."""
        found: dict[str, list[str]] = {}
        with suppress(OSError, UnicodeDecodeError):
            ours = re.escape(_braced(self._labels).removesuffix("}"))
            whole = re.compile(rf'(\w+){ours}(,(reason|stage)="\w+")?}} \S+')
            for line in self._file.read_text(encoding="utf-8").split("\n"):
                if (sample := whole.fullmatch(line)) and sample[1] in HELP:
                    found.setdefault(sample[1], []).append(line)
        return found

    def _write(self) -> None:
        self._written = time.monotonic()
        lines = []
        for name, text in HELP.items():
            if samples := self._samples.get(name):
                lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", *samples]
        # Not named *.prom while it is a draft: the collector takes all that are.
        draft = DiskDraft(self._file.parent, f"{self._file.name}.draft")
        try:
            draft.sink.write_text("\n".join(lines) + "\n", encoding="utf-8")
            # No wait for the disk, as for what must survive a power cut: this is soon out of date.
            os.replace(draft.sink, self._file)
        finally:
            draft.discard()


def _sample(name: str, labels: Labels, value: float) -> str:
    return f"{name}{_braced(labels)} {value}"


def _braced(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
