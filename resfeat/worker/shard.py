"""`process_shard`: one shard from plan to commit."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
from numpy.typing import NDArray

from resfeat.dataset import FailedItem, Part, Row, kept_rows
from resfeat.decoding import CarefulDecoder
from resfeat.errors import ResfeatError, first_line
from resfeat.plan import read_shard
from resfeat.sources import Item, gone
from resfeat.worker.batches import Batch, Batches
from resfeat.worker.messages import ShardResult, Task
from resfeat.worker.worker import Worker

# Why images fail whose source is gone.
UNREAD = ("not_found", "io_error")


def process_shard(worker: Worker, task: Task) -> ShardResult:
    """Embed one shard and commit it; what stays of an earlier commit is not done again.

    Raises Stopped, with nothing committed, soon after the worker is told to stop, DecoderHungError
    where the worker cannot go on, and ResfeatError where the dataset cannot be read or written, or
    the source is gone.
    """
    layout, shard = worker.layout, task.shard
    careful = CarefulDecoder(worker.placement.cpus) if task.careful else nullcontext(worker)
    counts: Counter[str] = Counter()
    with _told_of(worker, task):
        items = read_shard(layout.plan, shard)
        stays = _staying(worker, task, items)
        wanted = [place for place in range(len(items)) if place not in stays]
        unread: list[str] = []
        schema = worker.schema(task.parity)
        with Part(layout, shard.number, schema, shard.generation) as part, careful as decoder:
            weave = _Weave(part, stays, wanted)
            batches = Batches(worker, decoder.decode)
            for batch in batches.of([items[place] for place in wanted]):
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
                weave.end(len(items))
                part.commit(item.id for item in items)
    return ShardResult(
        shard=shard.number,
        embedded=counts["embedded"],
        failed=counts["failed"],
        kept=len(stays),
        changed=counts["changed"],
        fits=worker.fits,
        seconds=batches.seconds,
    )


# An image as it stands in a part, with its layers side by side.
Done = tuple[Row | FailedItem, NDArray[np.floating]]


def _staying(worker: Worker, task: Task, items: Sequence[Item]) -> dict[int, Done]:
    """The images that are not done again, by their places in the shard."""
    kept = kept_rows(worker.layout, task.shard.number)
    job = worker.job
    none = np.zeros(sum(job.dims.values()), job.identity.dtype)
    images = ((place, kept.of(item, retry=task.retry)) for place, item in enumerate(items))
    return {
        place: kept.rows[image.id] if isinstance(image, Row) else (image, none)
        for place, image in images
        if image
    }


class _Weave:
    """Puts images into a part in plan order: those that stay, by their places, and those that are
    wanted. place: of the next one."""

    def __init__(self, part: Part, stays: Mapping[int, Done], wanted: Sequence[int]) -> None:
        self.place = 0
        self._part, self._stays, self._wanted = part, stays, wanted

    def add(self, batch: Batch) -> None:
        """The next of those that are wanted, after all that stay before the last of them."""
        places = self._wanted[batch.first : batch.first + len(batch.images)]
        if places[-1] - self.place < len(places):  # none that stays lies between
            self._part.add(batch.images, batch.vectors)
            self.place = places[-1] + 1
            return
        done = zip(batch.images, batch.vectors, strict=True)
        self._until(places[-1] + 1, dict(zip(places, done, strict=True)))

    def end(self, count: int) -> None:
        """What stays behind the last that was wanted, of so many images in all."""
        self._until(count, {})

    def _until(self, end: int, done: Mapping[int, Done]) -> None:
        every = [done.get(place) or self._stays[place] for place in range(self.place, end)]
        if every:
            images, vectors = zip(*every, strict=True)
            self._part.add(images, np.stack(vectors))
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
