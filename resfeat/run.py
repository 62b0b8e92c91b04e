"""One run: the output folder held, the plan made, resumed or updated, what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from resfeat.dataset import (
    ALL,
    Commits,
    Dataset,
    Layout,
    Lock,
    Record,
    commit_generation,
    held,
    whole,
    write_card,
)
from resfeat.errors import ChoiceError, ResfeatError, Stopped, StoreError, UsageError
from resfeat.plan import (
    Changes,
    Difference,
    Partition,
    Plan,
    Shard,
    carried_columns,
    shard_size_for,
    write_plan,
)
from resfeat.reporting import Preview, Progress, Report, Tally, Watch, last_rate, versions
from resfeat.sources import Listing, printable
from resfeat.spec import ExtractSpec
from resfeat.storage import remove_all, write_json
from resfeat.worker import SHARDS_IN_HAND, Task

if TYPE_CHECKING:
    import pyarrow as pa

    from resfeat.backbones.weights import Weights

LISTED_BETWEEN_CALLS = 10_000


@dataclass(frozen=True)
class Request:
    """What a run is asked for, and where it looks and writes. started: by `time.monotonic`.
    partition: the shards that it is to do; None has all of them."""

    spec: ExtractSpec
    layout: Layout
    listing: Listing
    watch: Watch
    started: float
    partition: Partition | None = None

    def has_work(self) -> bool:
        """Whether there is anything to do, as the dataset stands now and is listed."""
        record = Record.load(self.layout)
        return record is None or bool(self.todo(record))

    def shards(self, record: Record) -> list[Shard]:
        """Those that this run has to see done, ascending."""
        every, mine = record.plan.shards.values(), self.partition
        return [shard for shard in every if mine is None or mine.has(shard.number)]

    def todo(self, record: Record) -> list[Shard]:
        """Shards that are not done, and, where that is asked for, those with failures."""
        commits = Commits.of(self.layout, record.plan)
        again = commits.failures if self.spec.retry_failed else frozenset()
        done = commits.done.keys() - again
        return [shard for shard in self.shards(record) if shard.number not in done]

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

    def listed(self) -> Iterator[pa.Table]:
        """The tables of the listing, while the user is told how far it is. Raises Stopped."""
        self.watch.step(f"listing {', '.join(self.spec.sources)}")
        listed = told = 0
        for table in self.listing.tables():
            listed += table.num_rows
            if listed - told >= LISTED_BETWEEN_CALLS:
                told = listed
                self.watch.progress(Progress(None, listed, doing="listing"))
                if self.watch.stopping():
                    raise Stopped("stopped while listing: nothing was written")
            yield table

    def no_images(self) -> UsageError:
        """What is said where the sources hold no image."""
        skipped = self.listing.skipped.most_common(3)
        passed_over = ", ".join(f"{count} {kind}" for kind, count in skipped)
        return UsageError(
            f"no images in {', '.join(self.spec.sources)}"
            + (f" (passed over: {passed_over})" if passed_over else "")
            + ": name a folder that holds some"
        )

    def difference(self, record: Record) -> Difference:
        """What an update of this dataset would change. Raises UsageError for one whose first
        listing is not done, and where there is nothing to list."""
        layout, plan = self.layout, record.plan
        left = len(plan.shards.keys() - Commits.of(layout, plan).done.keys())
        if left and not plan.generation:
            raise UsageError(
                f"{layout.root} is not finished, {left:,} of {len(plan.shards):,} shards are left: "
                "give the same command without --update first"
            )
        if self.listing.carried != carried_columns(layout.plan, plan):
            raise UsageError(
                f"the columns to keep are of other types than in {layout.root}: give them the "
                "types that they had, or give a new -o"
            )
        found = Difference(layout.plan, plan, self.listed())
        if found.changes.removed == plan.items and not found.changes.added:
            raise self.no_images()
        return found

    def check_gone(self, record: Record, changes: Changes) -> None:
        """Raise ResfeatError where an update would remove more than is likely."""
        share, most = changes.removed / max(1, record.plan.items), self.spec.max_gone
        if share > most:
            raise ResfeatError(
                f"{changes.removed:,} of the {record.plan.items:,} images of {self.layout.root} "
                f"are gone from its sources, {share:.1%}, more than --max-gone {most:.1%}: is one "
                f"not mounted? To have them go, give --max-gone {min(1, share + 0.005):.2f}"
            )


@dataclass
class Run:
    """A run that holds its output. is_new: whether it made the plan. record: gets the int8 network
    and the parity once they are known; `tasks` takes both from it. changes: of an update."""

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
        for note in self.weights.notes:
            self.tally.note(note)

    @property
    def layout(self) -> Layout:
        return self.request.layout

    def tasks(self) -> list[Task]:
        """What the workers are to do. With care: shards that are known to hold what kills a
        decoder, and those that the last run may have had in hand when it was killed."""
        todo, commits = self.tally.todo, Commits.of(self.layout, self.record.plan)
        killers = {"decoder_crash", "timeout"}
        notes = ((shard, commits.done.get(shard.number)) for shard in todo)
        careful = {shard for shard, note in notes if note and killers & note.reasons.keys()}
        if self.lock.killed:
            # Of shards that are done once more it cannot be told which that run had come to.
            again = commits.done.keys() | commits.behind
            careful |= {shard for shard in todo if shard.number in again}
            careful |= set(todo[:SHARDS_IN_HAND])
        retry, parity = self.request.spec.retry_failed, self.record.parity
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
        report = replace(
            report,
            skipped=dict(self.request.listing.skipped),
            update=self.changes,
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
            record = Record.load(layout)
            if record and not layout.committed():
                record = _taken_over(request, layout, weights, record)
                if record is None:
                    Record.forget(layout)
            if record and not layout.is_on_disk:
                record.save(layout)  # what an earlier holder sent comes too late now
            if is_new := record is None:
                record = _make_plan(request, layout, weights)
            record.check_same(layout, _asked(request, weights, record.plan, record.created))
            changes = None
            if request.spec.update and not is_new:
                record, changes = _update(request, record, weights)
        yield Run(request, lock, weights, record, is_new, changes)


def _make_plan(request: Request, layout: Layout, weights: Weights) -> Record:
    """List the sources, freeze the listing, and write down what the dataset is."""
    spec, listing = request.spec, request.listing
    if layout.is_on_disk:
        remove_all(layout.plan)  # of a run that was killed while it was listing
    layout.plan.mkdir()
    plan = write_plan(layout.plan, layout.tmp, request.listed(), spec.shard_size, listing.carried)
    if not plan.items:
        raise request.no_images()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return _written(request, layout, _asked(request, weights, plan, now), weights)


def _update(request: Request, record: Record, weights: Weights) -> tuple[Record, Changes]:
    """List the sources again, and make what that gives the dataset's plan, if it differs."""
    layout = request.layout
    found = request.difference(record)
    request.check_gone(record, found.changes)
    if found.changes:
        plan = found.write(layout.tmp)
        # The card first: a run that is killed behind the record finds nothing left to change.
        now = replace(record, plan=plan)
        write_card(layout, now, weights.dims, request.listing.carried)
        record = commit_generation(layout, record, plan)
    return record, found.changes


def _taken_over(
    request: Request, layout: Layout, weights: Weights, record: Record
) -> Record | None:
    """The listing of a run that committed nothing, with the choices of this one: nothing binds it
    to those of the last. None if this run would list something else."""
    now = _asked(request, weights, record.plan, record.created)
    listed = [(each.sources, each.source_options, each.plan.shard_size) for each in (record, now)]
    if listed[0] != listed[1]:
        return None
    return (
        record if record.identity == weights.identity else _written(request, layout, now, weights)
    )


def _written(request: Request, layout: Layout, record: Record, weights: Weights) -> Record:
    """The record of a dataset that has no rows yet, written down, and its card."""
    write_card(layout, record, weights.dims, request.listing.carried)
    record.save(layout)
    return record


def _asked(request: Request, weights: Weights, plan: Plan, created: str) -> Record:
    """What this run would have the dataset be, with a plan of its own or that which is there."""
    spec = request.spec
    return Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=tuple(request.listing.roots),
        source_options=spec.source_options,
        plan=replace(plan, shard_size=spec.shard_size or plan.shard_size),
        created=created,
        versions=versions(),
    )


def previewed(request: Request, weights: Weights) -> Preview:
    """What a run would do: of a first one, and of an update, once it has listed."""
    record = Record.load(request.layout)
    if record is None:
        items = sum(table.num_rows for table in request.listed())
        if not items:
            raise request.no_images()
        size = request.spec.shard_size or shard_size_for(items)
        return Preview(
            output=str(request.layout.root), items=items, images=items, shards=-(-items // size)
        )
    record.check_same(request.layout, _asked(request, weights, record.plan, record.created))
    todo, changes, refusal = request.todo(record), None, None
    images, shards, items = sum(shard.rows for shard in todo), len(todo), record.plan.items
    if request.spec.update:
        found = request.difference(record)
        changes = found.changes
        items += changes.added - changes.removed
        images += changes.added + changes.changed
        shards = len({shard.number for shard in (*todo, *found.touched)}) + found.new_shards
        try:
            request.check_gone(record, changes)
        except ResfeatError as error:
            refusal = str(error)
    return Preview(
        output=str(request.layout.root),
        items=items,
        images=images,
        shards=shards,
        update=changes,
        rate=last_rate(Dataset(request.layout, record)),
        refusal=refusal,
    )
