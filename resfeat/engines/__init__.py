"""Who runs `process_shard`, and where: in the calling process, or on Ray.

Both engines have `placement` (where each worker runs), `description` (for the report), `embed` (one
worker embeds pictures uint8 [H, W, 3], to [N, D]; for another thread than that of `run`) and `run`
(the workers do tasks, in any order; Stopped after a drain). Where a task's parity is still to come,
`inline.py` has the first images embedded meanwhile, and `ray.py` waits for it.

When a worker dies, or an image hangs its decoder, its shards are done again by others, in careful
mode (`decoding/careful.py`). A shard that costs `pool.ATTEMPTS` workers ends the run; one whose
machine was preempted costs none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, TypeAlias

from resfeat.engines.cluster import Cluster
from resfeat.spec import RuntimeOptions

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights
    from resfeat.engines.inline import InlineEngine
    from resfeat.engines.ray import RayEngine
    from resfeat.worker import Job

    Engine: TypeAlias = InlineEngine | RayEngine

# How long shards in hand may take to finish once the run is asked to stop.
DRAIN_SECONDS = 20.0

# Called about twice a second: images done and failed in the shards in hand, live workers, and the
# seconds until the first of these shards is done, at the earliest; None if nobody knows yet.
OnProgress = Callable[[int, int, int, float | None], None]


def prepare(
    options: RuntimeOptions, step: Callable[[str], None] = lambda text: None
) -> AbstractContextManager[Cluster | None]:
    """Ray, if the options ask for it: begin it early, leave it at the end. `step` is told what the
    run waits for."""
    if options.workers == 0:
        return nullcontext()
    return closing(Cluster(options.address, step, options.workers))


def start(
    options: RuntimeOptions, job: Job, weights: Weights, shards: int, cluster: Cluster | None
) -> AbstractContextManager[Engine]:
    """The engine that the options ask for, to do so many shards; on Ray, if there is one."""
    if cluster is None:
        from resfeat.engines.inline import InlineEngine

        return closing(InlineEngine(options, job, weights))
    from resfeat.engines.ray import RayEngine

    return closing(RayEngine(options, job, weights, shards, cluster))
