"""Who runs `process_shard`, and where: in the calling process, or on Ray.

When a worker dies, or an image hangs its decoder, its shards are done again by others, in careful
mode (`decoding/careful.py`). A shard that costs `pool.ATTEMPTS` workers ends the run; one whose
machine was preempted costs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from resfeat.engines.cluster import Cluster
from resfeat.spec import RuntimeOptions
from resfeat.worker import Job, Placement, ShardResult, Task

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights

# How long shards in hand may take to finish once the run is asked to stop.
DRAIN_SECONDS = 20.0
POLL_SECONDS = 0.5

# Images done and failed in the shards in hand, and how many workers are live.
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
        """Do the tasks, in any order.
        `on_progress` is called about twice a second. Raises Stopped after a drain, ResfeatError if
        it cannot."""
        ...


def prepare(
    options: RuntimeOptions, step: Callable[[str], None] = lambda text: None
) -> AbstractContextManager[Cluster | None]:
    """Ray, if the options ask for it: begin it early, leave it at the end. `step` is told what the
    run waits for."""
    return closing(Cluster(options.address, step)) if options.workers != 0 else nullcontext()


def start(
    options: RuntimeOptions, job: Job, weights: Weights, shards: int, cluster: Cluster | None
) -> AbstractContextManager[Engine]:
    """The engine that the options ask for, to do so many shards; on Ray, if there is one."""
    if cluster is None:
        from resfeat.engines.inline import InlineEngine

        return closing(InlineEngine(options, job, weights))
    from resfeat.engines.ray import RayEngine

    return closing(RayEngine(options, job, weights, shards, cluster))
