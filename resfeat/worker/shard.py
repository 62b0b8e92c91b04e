"""`process_shard`: one shard from plan to commit."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice

import pyarrow as pa

from resfeat.dataset import FailedItem, Kept, Part, kept_rows
from resfeat.decoding import CarefulDecoder
from resfeat.errors import ResfeatError, first_line
from resfeat.plan import read_shard
from resfeat.sources import gone
from resfeat.worker.batches import Batch, Batches
from resfeat.worker.messages import ShardResult, Task
from resfeat.worker.worker import Worker

# Why images fail whose source is gone.
UNREAD = ("not_found", "io_error")


def process_shard(worker: Worker, task: Task) -> ShardResult:
    """Embed one shard and commit it; what stays of an earlier commit is not done again.

    Raises Stopped, with nothing committed, soon after the worker is told to stop or to drop it,
    DecoderHungError where the worker cannot go on, and ResfeatError where the dataset cannot be
    read or written, or the source is gone.
    """
    layout, shard = worker.layout, task.shard
    careful = CarefulDecoder(worker.placement.cpus) if task.careful else nullcontext(worker)
    counts: Counter[str] = Counter()
    with _told_of(worker, task):
        items = read_shard(layout.plan, shard)
        kept = kept_rows(layout, shard.number)
        stays = [kept.of(item, retry=task.retry) for item in items]
        wanted = [place for place, each in enumerate(stays) if each is None]
        unread: list[str] = []
        with careful as decoder, ExitStack() as stack:
            batches = Batches(worker, decoder.decode, shard)
            finished = batches.of([items[place] for place in wanted])
            stack.enter_context(closing(finished))
            begun = list(islice(finished, 1))  # the first images need not wait for the parity
            schema = worker.schema(task.measured())
            part = stack.enter_context(Part(layout, shard.number, schema, shard.generation))
            weave = _Weave(part, kept, stays, wanted)
            for batch in chain(begun, finished):
                with batches.stage("write"):
                    weave.add(batch)
                failed = [each for each in batch.images if isinstance(each, FailedItem)]
                unread += [each.uri for each in failed if each.failure.reason in UNREAD]
                counts["failed"] += len(failed)
                counts["embedded"] += len(batch.images) - len(failed)
                counts["changed"] += batch.changed
                worker.progress[shard] = (weave.place, counts["failed"])
            if unread and (root := gone(worker.job.sources, unread)):
                raise ResfeatError(
                    f"source {root} is gone: mount it, or bring it back, and give the same command "
                    "again, it resumes"
                )
            with batches.stage("write"):
                weave.keep(len(items))
                part.commit(item.id for item in items)
    return ShardResult(
        shard=shard.number,
        embedded=counts["embedded"],
        failed=counts["failed"],
        kept=len(items) - len(wanted),
        changed=counts["changed"],
        fits=worker.fits,
        seconds=batches.seconds,
        steady=worker.runtime.steady,
        bytes_read=batches.bytes_read,
    )


@dataclass
class _Weave:
    """Puts images into a part in plan order: what stays, by place in the shard, as `Kept.of` gives
    it, and between them those that are wanted. place: of the next one."""

    part: Part
    kept: Kept
    stays: Sequence[int | FailedItem | None]
    wanted: Sequence[int]
    place: int = 0

    def add(self, batch: Batch) -> None:
        """The next of those that are wanted, each after all that stays before it."""
        first = 0
        for n in range(len(batch.images)):
            place = self.wanted[batch.first + n]
            if place > self.place:
                self.part.add(batch.images[first:n], batch.vectors[first:n])
                self.keep(place)
                first = n
            self.place = place + 1
        self.part.add(batch.images[first:], batch.vectors[first:])

    def keep(self, end: int) -> None:
        """What stays before this place."""
        if stay := self.stays[self.place : end]:
            rows = pa.array([each for each in stay if isinstance(each, int)], pa.int64())
            failures = [each for each in stay if isinstance(each, FailedItem)]
            self.part.keep(self.kept.table.take(rows), failures)
            self.place = end


@contextmanager
def _told_of(worker: Worker, task: Task) -> Iterator[None]:
    """Say of what goes wrong with which shard it was, and what can be done about it."""
    where = f"shard {task.shard} of {worker.layout.root}"
    try:
        yield
    except OSError as error:
        next_step = "mend that and give the same command again, it resumes"
        raise ResfeatError(f"{where}: {error}; {next_step}") from error
    except (MemoryError, RuntimeError) as error:  # the latter of torch and OpenVINO
        next_step = "is memory short? give a smaller --batch-size"
        raise ResfeatError(f"{where}: {first_line(error)}; {next_step}") from error
    finally:
        worker.progress.pop(task.shard, None)
