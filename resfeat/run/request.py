"""`Request`: what a run is asked for, and what that comes to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resfeat.dataset import Commits, Dataset, Layout, Record
from resfeat.errors import ResfeatError, Stopped, UsageError
from resfeat.plan import Changes, Difference, Partition, Shard, carried_columns
from resfeat.reporting import Progress, Watch, retried
from resfeat.sources import Listing, printable
from resfeat.spec import ExtractSpec
from resfeat.storage import public

if TYPE_CHECKING:
    import pyarrow as pa

SECONDS_BETWEEN_CALLS = 0.5


@dataclass(frozen=True)
class Request:
    """What a run is asked for, and where it looks and writes. started: by `time.monotonic`.
    partition: the shards that it is to do; None has all of them. options: for the report."""

    spec: ExtractSpec
    layout: Layout
    listing: Listing
    watch: Watch
    started: float
    partition: Partition | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def has_work(self) -> bool:
        """Whether there is anything to do, as the dataset stands now and is listed."""
        record = Record.load(self.layout)
        return record is None or bool(self.todo(record))

    def shards(self, record: Record) -> list[Shard]:
        """Those that this run has to see done, ascending."""
        every, mine = record.plan.shards.values(), self.partition
        return [shard for shard in every if mine is None or mine.has(shard.number)]

    def todo(self, record: Record) -> list[Shard]:
        """Shards that are not done, and, where that is asked for, those with failures, unless a run
        that was stopped has tried them again."""
        commits = Commits.of(self.layout, record.plan)
        again = commits.failures - self.retried(record) if self.spec.retry_failed else frozenset()
        done = commits.done.keys() - again
        return [shard for shard in self.shards(record) if shard.number not in done]

    def retried(self, record: Record) -> frozenset[int]:
        """Shards of which the run before this one tried the failures again until it was stopped."""
        partition = str(self.partition) if self.partition else None
        return retried(Dataset(self.layout, record).runs(), partition)

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
        if self.spec.update or not self.layout.spec.exists():
            self.listing.open()

    def listed(self) -> Iterator[pa.Table]:
        """The tables of the listing, while the user is told how far it is. Raises Stopped."""
        self.watch.step(f"listing {', '.join(map(public, self.spec.sources))}")
        listed, told = 0, time.monotonic()
        for table in self.listing.tables():
            listed += table.num_rows
            if time.monotonic() - told >= SECONDS_BETWEEN_CALLS:
                told = time.monotonic()
                self.watch.progress(Progress(None, listed, doing="listing"))
                if self.watch.stopping():
                    raise Stopped("stopped while listing: nothing was written")
            if table:  # else it is only there for a look at signals
                yield table

    def no_images(self) -> UsageError:
        """What is said where the sources hold no image."""
        skipped = self.listing.skipped.most_common(3)
        passed_over = ", ".join(f"{count} {kind}" for kind, count in skipped)
        return UsageError(
            f"no images in {', '.join(map(public, self.spec.sources))}"
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
