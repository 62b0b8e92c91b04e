"""What a worker is told, what it may use, and what it answers. All of it is small and travels."""

import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

import pyarrow as pa

from resfeat.dataset import Layout, Record
from resfeat.plan import Shard, addresses, carried_columns
from resfeat.runtimes import BATCH_SIZE, GPU_BATCH, choose
from resfeat.sources import RUN_IMAGES, is_local
from resfeat.spec import Identity, RuntimeName, RuntimeOptions
from resfeat.worker.sight import in_sight

# Files that a worker reads ahead while its decoders are busy: enough to hide the latency of a disk,
# and of a store or the web, where each file takes a request or two.
READ_AHEAD = 4
READ_AHEAD_FAR = 32
# Shards that a worker has in hand: it decodes and embeds one while the other drains and commits.
SHARDS_IN_HAND = 2
# Forward passes at a time on a GPU: the copies of one run while the other is computed.
PASSES_ON_GPU = 2
# Cores that one worker's decoding keeps busy: Python's lock lets it use hardly more.
CORES_FED = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do, the same for every worker of a run. The weights travel apart."""

    output: str
    share: str  # which share of the dataset the run writes
    sources: tuple[str, ...]
    reads_ahead: int
    identity: Identity
    dims: Mapping[str, int]  # length of each layer's embedding
    with_label: bool
    carried: tuple[pa.Field, ...] = ()  # columns that travel with the images
    quantised: str | None = None  # the digest of an int8 network
    token: str | None = None  # of the lease under which the run writes, in a store
    created: str = ""  # when the dataset was
    in_sight: tuple[str, ...] = ()  # what lies on a disk, and every worker's machine has to see

    @classmethod
    def of(
        cls, layout: Layout, record: Record, dims: Mapping[str, int], token: str | None = None
    ) -> Self:
        """The job that brings this dataset to completion."""
        uris = addresses(layout.plan, record.plan)
        return cls(
            output=str(layout.root),
            share=layout.share,
            sources=record.sources,
            reads_ahead=READ_AHEAD if all(map(is_local, uris)) else READ_AHEAD_FAR,
            identity=record.identity,
            dims=dims,
            with_label=record.source_options.label_from is not None,
            carried=carried_columns(layout.plan, record.plan),
            quantised=record.quantised,
            token=token,
            created=record.created,
            in_sight=in_sight(record.sources, uris),
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a worker runs and what it may use: "cpu" or "cuda", CPU cores, images in a batch, and
    its share of a GPU, 0 to 1."""

    runtime: RuntimeName
    device: str
    cpus: int
    batch_size: int
    gpus: float = 0.0

    @property
    def forward_threads(self) -> int:
        """Batches that are embedded at a time."""
        return PASSES_ON_GPU if self.device == "cuda" else self.cpus

    @property
    def at_once(self) -> int:
        """Images that may be done at the same time, after none for a while."""
        return max(self.cpus * RUN_IMAGES, self.forward_threads * self.batch_size)

    @classmethod
    def of(cls, options: RuntimeOptions, identity: Identity, gpus: float, cpus: int) -> Self:
        """Raises UsageError if no runtime on this device does what is asked."""
        device = "cuda" if gpus else "cpu"
        runtime = choose(options.runtime, identity.model, identity.precision, device)
        batch_size = options.batch_size or BATCH_SIZE[runtime, device]
        if gpus:
            batch_size = math.ceil(batch_size / GPU_BATCH) * GPU_BATCH
        return cls(runtime=runtime, device=device, cpus=cpus, batch_size=batch_size, gpus=gpus)


@dataclass(frozen=True)
class Task:
    """One shard to do. parity: how near the reference, if measured; rows say so. As a future it is
    still to come: such a task does not travel."""

    shard: Shard
    careful: bool = False  # in child processes: what crashes or hangs a decoder is a failure row
    retry: bool = False  # images that failed are tried again, though nothing changed in them
    parity: Future[Mapping[str, float] | None] | Mapping[str, float] | None = None

    def measured(self) -> Mapping[str, float] | None:
        """The parity, once it is known. Raises what the measuring raises."""
        return self.parity.result() if isinstance(self.parity, Future) else self.parity


@dataclass(frozen=True)
class ShardResult:
    """What a committed shard gave. embedded, failed: images that were done; kept: those of which
    the rows stayed. worker: the number of the one that did it, and took: the seconds since it
    finished the shard before, or was given this one when it had none; both by the engine."""

    shard: int
    embedded: int
    failed: int
    kept: int
    changed: int  # images that are not what was listed
    fits: int  # images that the device's memory held at once
    seconds: Mapping[str, float]  # busy seconds by stage, added up over threads
    steady: bool = True  # as of a runtime
    bytes_read: int = 0
    worker: int = 1
    took: float = 0.0
