"""What a worker is told, what it may use, and what it answers. Small things, which travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from resfeat.spec import Identity, RuntimeName

# Files that a worker reads while all its decoders are busy: enough to hide the latency of a disk,
# and that of a store, where each takes two requests.
READ_AHEAD = 4
READ_AHEAD_IN_STORE = 32
# A worker has two shards in hand: one is decoded and embedded while the other drains and commits.
SHARDS_IN_HAND = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, the same for every worker of a run. Small: the weights travel apart.

    dims: length of each layer's embedding. reads_ahead: files that are read while all decoders are
    busy.
    """

    output: str
    sources: tuple[str, ...]
    reads_ahead: int
    identity: Identity
    dims: Mapping[str, int]
    with_label: bool


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a worker runs and what it may use: "cpu" or "cuda", CPU cores, images in a batch."""

    runtime: RuntimeName
    device: str
    cpus: int
    batch_size: int


@dataclass(frozen=True)
class ShardResult:
    """What a committed shard gave.

    kept: images that had been embedded before, among those embedded. fits: images that were
    embedded at once in the end, fewer than a batch where the device's memory did not hold one.
    seconds: busy ones by stage, added up over threads.
    """

    shard: int
    embedded: int
    failed: int
    kept: int
    changed: int
    fits: int
    seconds: Mapping[str, float]
