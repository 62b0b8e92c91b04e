"""One run: the output folder held, the plan made or resumed, what is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from resfeat.dataset import Commits, Dataset, Layout, Lock, Record, run_lock, write_card
from resfeat.errors import ChoiceError, ResfeatError, Stopped, StoreError, UsageError
from resfeat.plan import Plan, Shard, carried_columns, write_plan
from resfeat.reporting import Progress, Report, Tally, Watch, versions
from resfeat.sources import Listing, printable
from resfeat.spec import ExtractSpec, Identity
from resfeat.storage import is_remote, remove_all, write_json
from resfeat.worker import SHARDS_IN_HAND, Task

if TYPE_CHECKING:
    import pyarrow as pa

    from resfeat.backbones.weights import Weights

SECONDS_BETWEEN_CALLS = 0.5


@dataclass(frozen=True)
class Request:
    """What a run is asked for, and where it looks and writes. started: by `time.monotonic`."""

    spec: ExtractSpec
    layout: Layout
    listing: Listing
    watch: Watch
    started: float

    def has_work(self) -> bool:
        """Whether there is anything to do, as the dataset stands now."""
        record = Record.load(self.layout)
        return record is None or bool(self.todo(record))

    def todo(self, record: Record) -> list[Shard]:
        """Shards that are not done, and, where that is asked for, those with failures."""
        commits = Commits.of(self.layout)
        again = commits.failures if self.spec.retry_failed else frozenset()
        done = commits.done.keys() - again
        return [shard for number, shard in record.plan.shards.items() if number not in done]

    def check_free(self) -> None:
        """Raise UsageError where the output is something else."""
        layout, root = self.layout, self.layout.root
        if (name := printable(str(root))) != str(root):
            raise UsageError(f"output {name} has bytes that are not UTF-8: rename it")
        if str(root) in self.listing.roots:
            raise UsageError(f"output {root} is also a source: give a folder of its own")
        if not root.exists():
            return
        if not root.is_dir():
            raise UsageError(f"output {root} is a file: give a folder")
        if not layout.private.exists() and any(root.iterdir()):
            hint = "give a new folder, or that of a dataset to resume"
            raise UsageError(f"output {root} holds other files: {hint}")

    def check_sources(self) -> None:
        """Raise UsageError where the sources have to be listed, and cannot."""
        if not self.layout.spec.exists():
            self.listing.open()


@dataclass
class Run:
    """A run that holds its output. is_new: whether it made the plan. record: gets the int8 network
    and the parity once they are known; `tasks` takes both from it."""

    request: Request
    lock: Lock
    weights: Weights
    record: Record
    is_new: bool
    tally: Tally

    @property
    def layout(self) -> Layout:
        return self.request.layout

    def tasks(self) -> list[Task]:
        """What the workers are to do. With care: shards that are known to hold what kills a
        decoder, and those that the last run may have had in hand when it was killed."""
        todo, commits = self.tally.todo, Commits.of(self.layout)
        killers = {"decoder_crash", "timeout"}
        notes = ((shard, commits.done.get(shard.number)) for shard in todo)
        careful = {shard for shard, note in notes if note and killers & note.reasons.keys()}
        if self.lock.killed:
            # Of shards that are done once more it cannot be told which that run had come to.
            again = commits.done.keys() | commits.half
            careful |= {shard for shard in todo if shard.number in again}
            careful |= set(todo[:SHARDS_IN_HAND])
        return [Task(shard, shard in careful, self.record.parity) for shard in todo]

    def end(self, error: ResfeatError | None) -> Report:
        """Write the report. Raises the error of a run that failed.

        Decides what a failed run leaves. The plan and what is committed stay, for the same command
        to go on from; only a dataset that was just begun with a choice that does not work out is
        not kept: `_held` then clears the folder. In a store it is kept, and binds nobody.
        """
        if self.lock.taken.is_set() and error:
            raise error  # the folder is another run's now
        if self.is_new and isinstance(error, ChoiceError):
            if isinstance(self.layout.root, Path):
                Record.forget(self.layout)  # without it, `_held` removes all that is left
            raise error
        if isinstance(error, StoreError) and is_remote(str(self.layout.root)):
            raise error  # the report would go to the store that just failed
        dataset = Dataset(self.layout, self.record)
        report = self.tally.report(dataset, self.request.listing.skipped, error)
        # A disk too full for the report must not hide the error that the report is about.
        with suppress(OSError) if report.error else nullcontext():
            place = self.layout.run_report(report.run_id)
            write_json(self.layout.tmp, place, report.as_dict())
        if report.status == "failed":
            raise ResfeatError(report.error) from error
        return report


@contextmanager
def begin(request: Request, weights: Weights) -> Iterator[Run]:
    """A run with its output held, and the plan made or resumed.

    Raises UsageError where the dataset that is there was made with other choices, or no image is
    found, Stopped where it was stopped while it listed, and ResfeatError where another run writes.
    """
    with _held(request) as lock:
        record = Record.load(request.layout)
        if record and not request.layout.committed():
            record = _taken_over(request, weights, record)
            if record is None:
                request.listing.open()  # before the listing that is there is given up
                Record.forget(request.layout)
        if record and is_remote(str(request.layout.root)):
            record.save(request.layout)  # what an earlier holder sent comes too late now
        if is_new := record is None:
            record = _make_plan(request, weights)
        _check_same(request, record, weights)
        todo = request.todo(record)
        tally = Tally(record.plan, todo, request.watch, request.started)
        if lock.killed:
            last = f"the last run ({lock.killed}) was killed"
            tally.note(f"{last}: going on from what it had committed")
        for note in weights.notes:
            tally.note(note)
        yield Run(request, lock, weights, record, is_new, tally)


@contextmanager
def _held(request: Request) -> Iterator[Lock]:
    """The output folder, made if it is not there, with its lock held.

    Where it ends without a record, what it made is removed again; but nothing in a store, where a
    request to remove the plan may arrive when it is that of another run. That run writes over it.
    """
    layout, root = request.layout, request.layout.root
    with writable(layout):
        parents = [root, *root.parents] if isinstance(root, Path) else []
        made = [folder for folder in parents if not folder.exists()]
        try:
            for folder in layout.folders:
                folder.mkdir(parents=True, exist_ok=True)
            with run_lock(layout, on_wait=request.watch.note) as lock:
                try:
                    _tidy(layout)  # of what a killed run left
                    yield lock
                finally:
                    if lock.is_held():  # else it is another's
                        _tidy(layout)  # of what workers left that were killed or stopped
                        if isinstance(root, Path) and not layout.spec.exists():
                            remove_all(layout.private)
                            layout.card.unlink(missing_ok=True)
                            _remove_empty([Path(str(layout.embeddings)), *made])
        except OSError:
            _remove_empty(made)
            raise


@contextmanager
def writable(layout: Layout) -> Iterator[None]:
    """Say of what goes wrong with the output's folders what can be done about it."""
    try:
        yield
    except OSError as error:
        raise ResfeatError(
            f"cannot write to {layout.root}: {error.strerror or error}; give a folder that can be "
            "written, with space left, and the same command again"
        ) from error


def _tidy(layout: Layout) -> None:
    """Remove the drafts of this share of the dataset, which no run is writing any more."""
    for leftover in layout.tmp.iterdir() if isinstance(layout.tmp, Path) else ():
        leftover.unlink(missing_ok=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _make_plan(request: Request, weights: Weights) -> Record:
    """List the sources, freeze the listing, and write down what the dataset is."""
    layout, spec, listing = request.layout, request.spec, request.listing
    request.watch.step(f"listing {', '.join(spec.sources)}")
    if isinstance(layout.plan, Path):
        remove_all(layout.plan)  # of a run that was killed while it was listing
    layout.plan.mkdir()
    plan = write_plan(layout.plan, layout.tmp, _watched(request), spec.shard_size, listing.carried)
    if not plan.items:
        skipped = ", ".join(f"{count} {kind}" for kind, count in listing.skipped.most_common(3))
        raise UsageError(
            f"no images in {', '.join(spec.sources)}"
            + (f" (passed over: {skipped})" if skipped else "")
            + ": name a folder that holds some"
        )
    return _written(request, weights, plan, datetime.now(UTC).isoformat(timespec="seconds"))


def _taken_over(request: Request, weights: Weights, record: Record) -> Record | None:
    """The listing of a run that committed nothing, with the choices of this one: nothing binds it
    to those of the last. None if this run would list something else."""
    spec, plan = request.spec, record.plan
    listed = (record.sources, record.source_options, spec.shard_size or plan.shard_size)
    if listed != (tuple(request.listing.roots), spec.source_options, plan.shard_size):
        return None
    if record.identity == weights.identity:
        return record
    return _written(request, weights, plan, record.created)


def _written(request: Request, weights: Weights, plan: Plan, created: str) -> Record:
    """The record of a dataset that has no rows yet, written down, and its card."""
    record = Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=tuple(request.listing.roots),
        source_options=request.spec.source_options,
        plan=plan,
        created=created,
        versions=versions(),
    )
    carried = carried_columns(request.layout.plan, plan)
    write_card(request.layout, record, weights.dims, carried)
    record.save(request.layout)
    return record


def _watched(request: Request) -> Iterator[pa.Table]:
    listed, told = 0, time.monotonic()
    for table in request.listing.tables():
        listed += table.num_rows
        if time.monotonic() - told >= SECONDS_BETWEEN_CALLS:
            told = time.monotonic()
            request.watch.progress(Progress(None, listed, doing="listing"))
            if request.watch.stopping():
                raise Stopped("stopped while listing: nothing was written")
        if table:  # else it is only there for a look at signals
            yield table


def _check_same(request: Request, record: Record, weights: Weights) -> None:
    """Refuse to mix two kinds of embeddings, or two listings, in one dataset."""
    spec, size = request.spec, record.plan.shard_size
    there, asked = _choices(record.identity), _choices(weights.identity)
    choices = {name: (there[name], asked[name]) for name in there}
    there, asked = vars(record.source_options), vars(spec.source_options)
    choices |= {name: (there[name], asked[name]) for name in there} | {
        "sources": (record.sources, tuple(request.listing.roots)),
        "shard_size": (size, spec.shard_size or size),
    }
    for name, (then, now) in choices.items():
        if then != now:
            raise UsageError(
                f"{request.layout.root} was made with another {name}: {_brief(then)} there, "
                f"{_brief(now)} now (weights {record.weights} there, {weights.origin} now); "
                "repeat its choices to resume it, or give a new -o"
            )


def _choices(identity: Identity) -> dict[str, object]:
    """The identity's fields, those of the preprocessing among them."""
    plain = vars(identity) | vars(identity.preprocessing)
    del plain["preprocessing"]
    return plain


def _brief(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
