"""Adding up a run while it goes on, and telling whoever watches it."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, Self

from resfeat.dataset import Dataset
from resfeat.errors import ResfeatError, Stopped
from resfeat.plan import Shard
from resfeat.reporting.course import Course
from resfeat.reporting.deadline import shortage
from resfeat.reporting.report import Report
from resfeat.worker import ShardResult

if TYPE_CHECKING:
    from resfeat.fidelity import Parity

NOTHING_DONE = (
    "no shard was done in this run: give it more time, or a new output with a smaller --shard-size"
)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: images of the whole dataset, done and failed so far, live workers. Before
    that the sources are listed, where total is None and done counts the images found, and int8 may
    be calibrated, where both count the images that are used for it."""

    total: int | None
    done: int
    failed: int = 0
    workers: int = 0
    doing: Literal["listing", "calibrating", "embedding"] = "embedding"


@dataclass(frozen=True)
class Watch:
    """What a run tells and asks; `resfeat.extract` says what of each."""

    note: Callable[[str], None] = lambda text: None
    step: Callable[[str], None] = lambda text: None
    progress: Callable[[Progress], None] = lambda progress: None
    stopping: Callable[[], bool] = lambda: False

    def in_turn(self) -> Self:
        """The same, for threads that tell of a run at the same time: one waits for the other."""
        lock = RLock()

        def alone(tell: Callable[[Any], None]) -> Callable[[Any], None]:
            def told(what: Any) -> None:
                with lock:
                    tell(what)

            return told

        return replace(
            self, note=alone(self.note), step=alone(self.step), progress=alone(self.progress)
        )


class Tally:
    """Adds up a run as its shards are committed. shards: those that it has to see done. started:
    when it was asked for, by `time.monotonic`."""

    def __init__(
        self, shards: Sequence[Shard], todo: Sequence[Shard], watch: Watch, started: float
    ) -> None:
        self.todo = todo  # the shards that are to be done
        self.done: set[int] = set()  # of these, those that are
        self._shards = shards
        self._items = sum(shard.rows for shard in shards)
        self._before = self._items - sum(shard.rows for shard in todo)
        self._watch = watch
        self._started = started
        self._first_worker: float | None = None
        self._last_commit: float | None = None
        self._counts: Counter[str] = Counter()
        self._stages: Counter[str] = Counter()
        self._course = Course()
        self._notes: list[str] = []
        self._fits: int | None = None
        self._steady = True
        self._is_told_of_time = False
        self.engine: Mapping[str, Any] = {}  # to be set to what the engine says of itself
        self.parity: Parity | None = None  # to be set to what was measured

    def note(self, text: str) -> None:
        """Tell the user something, now and in the report."""
        self._notes.append(text)
        self._watch.note(text)

    def add(self, result: ShardResult) -> None:
        self._last_commit = time.monotonic()
        self.done.add(result.shard)
        self._course.add(result, self._last_commit)
        self._counts["shards"] += 1
        self._counts["images"] += result.embedded + result.failed
        self._counts["kept"] += result.kept
        self._counts["images_failed"] += result.failed
        self._counts["changed"] += result.changed
        self._counts["bytes_read"] += result.bytes_read
        self._stages.update(result.seconds)
        batch_size = self.engine["batch_size"]
        if result.fits < (self._fits or batch_size):
            self._fits = result.fits
            more = f"--batch-size {result.fits} saves finding that out"
            if self.engine["device"] == "cuda":
                more = "fewer workers to a GPU, or nothing else on it, leave room for more"
            self.note(
                f"the device's memory held {result.fits} images at once and not the {batch_size} "
                f"of a batch: {more}"
            )

        if self._steady and not result.steady:
            self._steady = False
            self.note(
                "on this GPU the last bits of an embedding depend on its place in a batch: another "
                "--precision, or --model, may give the same bits every time"
            )

    def show(self, done: int, failed: int, workers: int, soonest: float | None) -> None:
        """Pass on where the run stands, given what the shards in hand have done so far. soonest:
        as of `engines.OnProgress`."""
        if workers and self._first_worker is None:
            self._first_worker = time.monotonic()
        done += self._before + self._counts["images"] + self._counts["kept"]
        failed += self._counts["images_failed"]
        self._watch.progress(Progress(self._items, done, failed, workers))
        if soonest is None or self._is_told_of_time or self._counts["shards"]:
            return
        if told := shortage(soonest):
            self._is_told_of_time = True
            self.note(told)

    def report(self, dataset: Dataset, error: ResfeatError | None) -> Report:
        """The run as it ended, and the dataset as it stands."""
        # What an engine takes to leave is no part of its speed.
        ended = self._last_commit or time.monotonic()
        begun = min(self._first_worker or ended, ended)  # the first shard may be done by then
        commits = dataset.commits().within(self._shards)
        embedded, failed = commits.embedded, sum(commits.reasons.values())
        if error is None and embedded + failed != self._items:
            error = ResfeatError(
                f"{dataset.layout.root} holds {embedded + failed:,} rows for {self._items:,} "
                "images: a part was changed since its commit; `resfeat verify --repair` names it "
                "and sends it back to be done again"
            )
        status: Literal["finished", "interrupted", "failed"] = "finished"
        if error:
            status = "interrupted" if isinstance(error, Stopped) else "failed"
        if status == "interrupted" and not self._counts["shards"]:
            self.note(NOTHING_DONE)  # who starts it again for as long as before gains nothing
        return Report(
            # Sorts by time, and differs between partitions that end together.
            run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%SZ-%f}-{secrets.token_hex(2)}",
            status=status,
            output=str(dataset.layout.root),
            precision=dataset.record.identity.precision,
            items=self._items,
            embedded=embedded,
            failed=failed,
            reasons=commits.reasons,
            shards_left=len(self.todo) - self._counts["shards"],
            start_seconds=round(begun - self._started, 3),
            seconds=round(ended - begun, 3),
            stages={stage: round(busy, 3) for stage, busy in self._stages.items()},
            course=self._course.rates(begun, ended),
            engine=self.engine,
            notes=self._notes,
            parity=self.parity,
            error=str(error) if error else None,
            **dict[str, Any](self._counts),
        )
