"""The frozen listing, cut into shards."""

from resfeat.plan.files import read_shard, write_plan
from resfeat.plan.index import Plan, PlanFile, Shard

__all__ = ["Plan", "PlanFile", "Shard", "read_shard", "write_plan"]
