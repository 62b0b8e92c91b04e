"""`Run`: one that holds its output, from its beginning to what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from resfeat.dataset import ALL, Commits, Dataset, Layout, Lock, Record, held, whole
from resfeat.errors import ChoiceError, ResfeatError, StoreError
from resfeat.plan import Changes
from resfeat.reporting import Report, Tally
from resfeat.run.planning import settled
from resfeat.run.request import Request
from resfeat.storage import write_json
from resfeat.worker import SHARDS_IN_HAND, Task

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights


@dataclass
class Run:
    """A run that holds its output. is_new: whether it made the plan. record: gets the int8 network
    and the parity once they are known. changes: of an update."""

    request: Request
    lock: Lock
    weights: Weights
    record: Record
    is_new: bool
    tally: Tally = field(init=False)
    changes: Changes | None = None

    def __post_init__(self) -> None:
        request = self.request
        shards, todo = request.shards(self.record), request.todo(self.record)
        self.tally = Tally(shards, todo, request.watch, request.started)
        if self.lock.killed:
            last = f"the last run ({self.lock.killed}) was killed"
            self.tally.note(f"{last}: going on from what it had committed")
        if request.spec.retry_failed and (before := len(request.retried(self.record))):
            text = f"the last run did {before} shards and was stopped: what failed in these is not"
            self.tally.note(f"{text} tried again")
        for note in self.weights.notes:
            self.tally.note(note)

    @property
    def layout(self) -> Layout:
        return self.request.layout

    def tasks(self, parity: Future[Mapping[str, float] | None]) -> list[Task]:
        """What the workers are to do. parity: how near the reference they are. With care: shards
        that are known to hold what kills a decoder, and those that the last run may have had in
        hand when it was killed."""
        todo, commits = self.tally.todo, Commits.of(self.layout, self.record.plan)
        killers = {"decoder_crash", "timeout"}
        notes = {**commits.done, **commits.behind}
        careful = {
            shard
            for shard in todo
            if (note := notes.get(shard.number)) and killers & note.reasons.keys()
        }
        if self.lock.killed:
            # Of shards whose failures are tried again it cannot be told which that run had come to.
            careful |= {shard for shard in todo if shard.number in commits.done}
            careful |= set(todo[:SHARDS_IN_HAND])
        retry = self.request.spec.retry_failed
        return [Task(shard, shard in careful, retry, parity) for shard in todo]

    @contextmanager
    def settling(self) -> Iterator[Layout]:
        """The dataset as a whole, to write down in `record` what all who share it go by. What
        another has settled meanwhile is in `record` then."""
        watch = self.request.watch
        with whole(self.layout, watch.note, watch.stopping) as layout:
            if layout is not self.layout:
                self.record = Record.load(layout) or self.record
            yield layout

    def end(self, error: ResfeatError | None) -> Report:
        """Write the report. Raises the error of a run that failed.

        Decides what a failed run leaves. The plan and what is committed stay, for the same command
        to go on from; only a dataset that was just begun with a choice that does not work out is
        not kept: `held` then clears the folder. In a store it is kept, and binds nobody; so it is
        where others share it.
        """
        layout = self.layout
        if self.lock.taken.is_set() and error:
            raise error  # the folder is another run's now
        if self.is_new and isinstance(error, ChoiceError):
            if layout.is_on_disk and layout.share == ALL:
                Record.forget(layout)  # without it, `held` removes all that is left
            raise error
        if isinstance(error, StoreError) and not layout.is_on_disk:
            raise error  # the report would go to the store that just failed
        report = self.tally.report(Dataset(layout, self.record), error)
        retried: set[int] = set()
        if self.request.spec.retry_failed and report.status != "finished":
            retried = {*self.tally.done, *self.request.retried(self.record)}
        report = replace(
            report,
            retried=sorted(retried),
            skipped=dict(self.request.listing.skipped),
            update=self.changes,
            options=self.request.options,
            partition=str(self.request.partition) if self.request.partition else None,
        )
        # A disk too full for the report must not hide the error that the report is about.
        with suppress(OSError) if report.error else nullcontext():
            write_json(layout.tmp, layout.run_report(report.run_id), report.as_dict())
        if report.status == "failed":
            raise ResfeatError(report.error) from error
        return report


@contextmanager
def begin(request: Request, weights: Weights) -> Iterator[Run]:
    """A run with its output held, and the plan made, resumed or updated.

    Raises UsageError where the dataset that is there was made with other choices, or no image is
    found, Stopped where it was stopped while it listed, and ResfeatError where another run writes,
    or too much is gone for an update.
    """
    watch = request.watch
    with held(request.layout, watch.note) as lock:
        with whole(request.layout, watch.note, watch.stopping) as layout:
            record, is_new, changes = settled(request, layout, weights)
        yield Run(request, lock, weights, record, is_new, changes)
