"""The frozen listing, cut into shards."""

from resfeat.plan.files import carried_columns, lies_far, read_shard, write_plan
from resfeat.plan.plan import Plan, PlanFile, Shard

__all__ = ["Plan", "PlanFile", "Shard", "carried_columns", "lies_far", "read_shard", "write_plan"]
