"""The frozen listing, cut into shards; what an update changes of it; which shards a run does."""

from resfeat.plan.files import (
    addresses,
    carried_columns,
    changed_since,
    read_shard,
    shard_size_for,
    write_plan,
)
from resfeat.plan.partition import Partition
from resfeat.plan.plan import Plan, PlanFile, Shard
from resfeat.plan.update import Changes, Difference

__all__ = [
    "Changes", "Difference", "Partition", "Plan", "PlanFile", "Shard", "addresses",
    "carried_columns", "changed_since", "read_shard", "shard_size_for", "write_plan",
]  # fmt: skip
