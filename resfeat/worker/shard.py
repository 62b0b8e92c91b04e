"""`process_shard`: one shard from plan to commit."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from resfeat.dataset import Part, Row, kept_rows
from resfeat.decoding import CarefulDecoder
from resfeat.errors import ResfeatError, first_line
from resfeat.plan import read_shard
from resfeat.sources import Item, gone
from resfeat.worker.batches import Batches
from resfeat.worker.messages import ShardResult, Task
from resfeat.worker.worker import Worker

# Why images fail whose source is gone.
UNREAD = ("not_found", "io_error")


def process_shard(worker: Worker, task: Task) -> ShardResult:
    """Embed one shard and commit it; rows of an earlier commit that `keeps` are not done again.

    Raises Stopped, with nothing committed, soon after the worker is told to stop, DecoderHungError
    where the worker cannot go on, and ResfeatError where the dataset cannot be read or written, or
    the source is gone.
    """
    layout, shard = worker.layout, task.shard
    careful = CarefulDecoder(worker.placement.cpus) if task.careful else nullcontext(worker)
    with _told_of(worker, task):
        items = read_shard(layout.plan, shard)
        committed = kept_rows(layout, shard.number)
        there = ((item, committed.get(item.id)) for item in items)
        kept = {item.id: row for item, row in there if row and keeps(row[0], item)}
        embedded = failed = changed = 0
        unread: list[str] = []
        with Part(layout, shard.number, worker.schema(task.parity)) as part, careful as decoder:
            batches = Batches(worker, kept, decoder.decode)
            for batch in batches.of(items):
                with batches.stage("write"):
                    part.add(batch.rows, batch.vectors, batch.failures)
                embedded += len(batch.rows)
                failed += len(batch.failures)
                changed += batch.changed
                unread += [each.uri for each in batch.failures if each.failure.reason in UNREAD]
                worker.progress[shard] = (embedded + failed, failed)
            if unread and (root := gone(worker.job.sources, unread)):
                raise ResfeatError(
                    f"source {root} is gone: mount it, or bring it back, and give the same command "
                    "again, it resumes"
                )
            with batches.stage("write"):
                part.commit(item.id for item in items)
    return ShardResult(
        shard.number, embedded, failed, len(kept), changed, worker.fits, batches.seconds
    )


def keeps(row: Row, item: Item) -> bool:
    """Whether a committed row stays when its shard is done once more: only failures do not."""
    return row.id == item.id


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
