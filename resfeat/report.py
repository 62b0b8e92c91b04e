"""The run report: what a run did, how fast, and what held it back."""

from __future__ import annotations

import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from resfeat import __version__, verdict
from resfeat.dataset import Dataset
from resfeat.errors import ResfeatError, Stopped
from resfeat.job import ShardResult
from resfeat.machine import hardware
from resfeat.plan import Plan

if TYPE_CHECKING:
    from resfeat.parity import Parity

LIBRARIES = (
    "torch", "torchvision", "openvino", "nncf", "pillow", "simplejpeg", "pyarrow", "ray"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one run did, and where the dataset stands after it.

    precision: of the dataset's forward passes. items, embedded, failed, reasons: the whole dataset.
    images, images_failed: this run alone, in shards that it committed. kept: images in those that
    were embedded before, and were not done again. changed: files that were not
    as listed any more when they were read. start_seconds: from the call until the first worker is
    live. seconds: from then to the last commit. stages: busy seconds by stage, added up over
    threads and workers; `wait` is the time that the model waited for pixels. skipped: files that
    were passed over in listing, by extension. notes: what a user should know of how the weights
    were read. parity: how near a sample was to the reference; None for the reference itself.
    """

    run_id: str
    status: Literal["finished", "interrupted", "failed"]
    output: str
    precision: str
    items: int
    embedded: int
    failed: int
    reasons: Mapping[str, int]
    images: int = 0
    images_failed: int = 0
    kept: int = 0
    changed: int = 0
    shards: int = 0
    shards_left: int = 0
    start_seconds: float = 0.0
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    parity: Parity | None = None
    error: str | None = None

    @property
    def images_per_second(self) -> float:
        """Images of this run by the time from the first live worker to the last commit."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def error_rate(self) -> float:
        """Share of the dataset's items that gave no embedding, 0 to 1."""
        return self.failed / self.items if self.items else 0.0

    @property
    def bottleneck(self) -> str | None:
        """The stage that decided the speed: read, decode, embed or write. None if nothing ran."""
        if not self.engine:
            return None
        return verdict.bottleneck(self.stages, self.engine["cpus"], self.engine["reads_ahead"])

    @property
    def waited(self) -> float:
        """Share of its time, 0 to 1, that the model waited for pixels."""
        return verdict.waited(self.stages)

    @property
    def verdict(self) -> str | None:
        """A sentence on what limited the run. None if nothing ran."""
        if not self.engine:
            return None
        return verdict.verdict(
            self.stages,
            device=self.engine["device"],
            cpus=self.engine["cpus"],
            precision=self.precision,
            reads_ahead=self.engine["reads_ahead"],
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as it is written to `_resfeat/runs/`."""
        return {
            **asdict(self),
            "images_per_second": round(self.images_per_second, 2),
            "bottleneck": self.bottleneck,
            "waited": round(self.waited, 4),
            "verdict": self.verdict,
            "hardware": hardware(),
            "versions": versions(),
        }


@dataclass(frozen=True)
class Progress:
    """Where a run stands: images of the whole dataset, done and failed so far, live workers.

    While the sources are being listed `total` is None and `done` counts the images found.
    """

    total: int | None
    done: int
    failed: int
    workers: int


class Tally:
    """Adds up a run as its shards are committed.

    todo: numbers of the shards that are to be done, ascending. started: when the run was
    asked for, by `time.monotonic`. on_note: is told what `note` is. engine, parity: to be set to
    what the engine says of itself, and to what was measured.
    """

    def __init__(
        self,
        plan: Plan,
        todo: Sequence[int],
        on_progress: Callable[[Progress], None],
        started: float,
        on_note: Callable[[str], None],
    ) -> None:
        self.todo = todo
        self._plan = plan
        self._before = plan.items - sum(map(plan.length, todo))
        self._on_progress = on_progress
        self._started = started
        self._first_worker: float | None = None
        self._last_commit: float | None = None
        self._counts: Counter[str] = Counter()
        self._stages: Counter[str] = Counter()
        self._on_note = on_note
        self._notes: list[str] = []
        self._fits: int | None = None
        self.engine: Mapping[str, Any] = {}
        self.parity: Parity | None = None

    def note(self, text: str) -> None:
        """Tell the user something of this run, now and in its report."""
        self._notes.append(text)
        self._on_note(text)

    def add(self, result: ShardResult) -> None:
        """A shard was committed."""
        self._last_commit = time.monotonic()
        self._counts["shards"] += 1
        self._counts["images"] += result.embedded + result.failed - result.kept
        self._counts["kept"] += result.kept
        self._counts["images_failed"] += result.failed
        self._counts["changed"] += result.changed
        self._stages.update(result.seconds)
        batch_size = self.engine["batch_size"]
        if result.fits < (self._fits or batch_size):
            self._fits = result.fits
            self.note(
                f"the device's memory held {result.fits} images at once and not the {batch_size} "
                f"of a batch: --batch-size {result.fits} saves finding that out"
            )

    def show(self, done: int, failed: int, workers: int) -> None:
        """Pass on where the run stands, given what the shards in hand have done so far.

        The clock of images per second starts when the first worker is live.
        """
        if workers and self._first_worker is None:
            self._first_worker = time.monotonic()
        done += self._before + self._counts["images"] + self._counts["kept"]
        failed += self._counts["images_failed"]
        self._on_progress(Progress(self._plan.items, done, failed, workers))

    @property
    def began(self) -> bool:
        """Whether any worker came to be live."""
        return self._first_worker is not None

    def report(
        self, dataset: Dataset, skipped: Mapping[str, int], error: ResfeatError | None
    ) -> Report:
        """The run as it ended, and the dataset as it stands, counted from its files."""
        # What an engine takes to leave is no part of its speed.
        ended = self._last_commit or time.monotonic()
        begun = self._first_worker or ended
        embedded, reasons = dataset.embedded(), dataset.reasons()
        failed = sum(reasons.values())
        if error is None and embedded + failed != self._plan.items:
            error = ResfeatError(
                f"{dataset.layout.root} holds {embedded + failed:,} rows for {self._plan.items:,} "
                "images: a part was changed since its commit; `resfeat verify --repair` names it "
                "and sends it back to be done again"
            )
        return Report(
            run_id=new_run_id(),
            status=_status(error),
            output=str(dataset.layout.root),
            precision=dataset.record.identity.precision,
            items=self._plan.items,
            embedded=embedded,
            failed=failed,
            reasons=reasons,
            shards_left=len(self.todo) - self._counts["shards"],
            start_seconds=round(begun - self._started, 3),
            seconds=round(ended - begun, 3),
            stages={stage: round(busy, 3) for stage, busy in self._stages.items()},
            engine=self.engine,
            skipped=dict(skipped),
            notes=self._notes,
            parity=self.parity,
            error=str(error) if error else None,
            **self._counts,
        )


def _status(error: ResfeatError | None) -> Literal["finished", "interrupted", "failed"]:
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, Stopped) else "failed"


def new_run_id() -> str:
    """Sorts by time, and differs between two runs of the same second."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def versions() -> dict[str, str]:
    """Of Python and of the libraries that an embedding or a run depends on."""
    ours = {"python": platform.python_version(), "resfeat": __version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # some are extras
            ours[name] = version(name)
    return ours
