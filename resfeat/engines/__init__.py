"""Who runs `process_shard`, and where: in the calling process, or on Ray.

Both engines are context managers with the same members:

    placement                           where each worker runs, and on what
    description                         what the report says of it: workers, device, batch size, ...
    embed(pictures, stopping)           embeddings of a few pictures, by one worker
    run(tasks, ...)                     does the shards and gives each one's ShardResult, Task

Where a worker dies, or an image hangs its decoder, another takes its place, and what it had in hand
is done again in careful mode (`careful.py`). A shard that costs `ATTEMPTS` workers ends the run.

`on_progress(done, failed, workers)` is told of the shards in hand about twice a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from resfeat.engines.cluster import Cluster
from resfeat.plan import Shard
from resfeat.runtimes import BATCH_SIZE, choose
from resfeat.storage import is_remote
from resfeat.worker import READ_AHEAD, READ_AHEAD_IN_STORE, Job, Placement, ShardResult, Task

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights
    from resfeat.dataset import Layout, Record
    from resfeat.spec import Identity, RuntimeOptions

# How long shards in hand may take to finish once the run is asked to stop.
DRAIN_SECONDS = 20.0
# A shard whose worker died this often is taken to be what kills it.
ATTEMPTS = 3

OnProgress = Callable[[int, int, int], None]


class Engine(Protocol):
    """What `extract` needs of an engine."""

    @property
    def placement(self) -> Placement:
        """Where each worker runs."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """Workers, device, cores, batch size and the like, for the report."""
        ...

    def embed(
        self, pictures: Sequence[NDArray[np.uint8]], stopping: Callable[[], bool]
    ) -> NDArray[np.float32]:
        """Embeddings [N, D] of pictures uint8 [H, W, 3], by one worker. Raises Stopped."""
        ...

    def run(
        self,
        tasks: Sequence[Task],
        on_progress: OnProgress,
        stopping: Callable[[], bool],
    ) -> Iterator[ShardResult]:
        """Do the tasks, in any order. Raises Stopped after a drain, ResfeatError if it cannot."""
        ...


def prepare(options: RuntimeOptions) -> AbstractContextManager[Cluster | None]:
    """Ray, if the options ask for it: to be begun early, and left at the end."""
    if options.workers == 0:
        return nullcontext()
    return Cluster(options.address)


def start(
    options: RuntimeOptions,
    layout: Layout,
    record: Record,
    weights: Weights,
    shards: Sequence[Shard],
    cluster: Cluster | None,
) -> AbstractContextManager[Engine]:
    """The engine that the options ask for, ready to run these shards; on Ray, if there is one."""
    job = as_job(layout, record, weights)
    if cluster is None:
        from resfeat.engines.inline import InlineEngine

        return InlineEngine(options, job, weights.tensors, layout.quantised)
    from resfeat.engines.ray import RayEngine

    return RayEngine(options, job, weights.tensors, layout.quantised, len(shards), cluster)


def as_job(layout: Layout, record: Record, weights: Weights) -> Job:
    """What all workers of a run are told."""
    return Job(
        output=str(layout.root),
        share=layout.share,
        sources=record.sources,
        reads_ahead=READ_AHEAD_IN_STORE if any(map(is_remote, record.sources)) else READ_AHEAD,
        identity=record.identity,
        dims=weights.dims,
        with_label=record.label_from is not None,
        quantised=record.quantised,
    )


def place(options: RuntimeOptions, identity: Identity, device: str, cpus: int) -> Placement:
    """What a worker on this device with so many cores is to use. Raises UsageError where it has no
    runtime for what is asked."""
    runtime = choose(options.runtime, identity.model, identity.precision, device)
    return Placement(
        runtime=runtime,
        device=device,
        cpus=cpus,
        batch_size=options.batch_size or BATCH_SIZE[runtime, device],
    )
