"""A worker: one model on one device, and what it makes of a shard.

What travels to and from a worker is here. `worker.py` and `shard.py` take torch with them, and are
imported where they run.
"""

from resfeat.worker.messages import (
    READ_AHEAD,
    READ_AHEAD_IN_STORE,
    SHARDS_IN_HAND,
    Job,
    Placement,
    ShardResult,
    Task,
)

__all__ = [
    "READ_AHEAD",
    "READ_AHEAD_IN_STORE",
    "SHARDS_IN_HAND",
    "Job",
    "Placement",
    "ShardResult",
    "Task",
]
