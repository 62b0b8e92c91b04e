"""What a worker is told, what it may use, and what it answers. Small things, which travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from resfeat.plan import Shard
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

    output, share: where the dataset is, and which share of it the run writes. reads_ahead: files
    that are read while all decoders are busy. dims: length of each layer's embedding. carried:
    columns that travel with the images. quantised: the digest of an int8 network.
    """

    output: str
    share: str
    sources: tuple[str, ...]
    reads_ahead: int
    identity: Identity
    dims: Mapping[str, int]
    with_label: bool
    carried: tuple[pa.Field, ...] = ()
    quantised: str | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a worker runs and what it may use: "cpu" or "cuda", CPU cores, images in a batch."""

    runtime: RuntimeName
    device: str
    cpus: int
    batch_size: int


@dataclass(frozen=True, order=True)
class Task:
    """One shard to do.

    careful: decode in child processes, so that what crashes or hangs a decoder is a failure row.
    parity: how near this run is to the reference, where that was measured; the rows say so.
    """

    shard: Shard
    careful: bool = False
    parity: Mapping[str, float] | None = field(default=None, compare=False)


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
