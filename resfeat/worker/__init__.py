"""A worker: one model on one device, and what it makes of a shard.

`worker.py` and `shard.py` take torch with them, and are imported where they run.
"""

from resfeat.worker.messages import (
    CORES_FED,
    SHARDS_IN_HAND,
    Job,
    Placement,
    ShardResult,
    Task,
)

__all__ = ["CORES_FED", "SHARDS_IN_HAND", "Job", "Placement", "ShardResult", "Task"]
