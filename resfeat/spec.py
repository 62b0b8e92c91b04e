"""What is asked for: the identity of an embedding, and how to run.

Two kinds of choices, two types. `Identity` holds everything that decides what an embedding *is*; it
is hashed into the fingerprint and never changes within a dataset. `RuntimeOptions` holds the rest,
which may change between a run and its resume.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from resfeat.errors import UsageError

# Bumped whenever decode.py would give other pixels for the same file.
PIXEL_POLICY = "1"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Pixels as the weights were trained on: short side to `resize`, centre `crop`, then normalise.

    `mean` and `std` are per RGB channel, for pixels scaled to 0..1.
    """

    resize: int
    crop: int
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides what an embedding is."""

    model: str
    weights_digest: str
    preprocessing: Preprocessing
    pixel_policy: str = PIXEL_POLICY
    layers: tuple[str, ...] = ("avgpool",)
    pool: str = "avg"
    precision: str = "fp32"
    dtype: str = "float32"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity as canonical JSON, 64 hex digits."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The identity as plain JSON values (tuples become lists)."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Identity:
        """The inverse of `as_dict`."""
        pixels = dict(plain["preprocessing"])
        pixels["mean"], pixels["std"] = tuple(pixels["mean"]), tuple(pixels["std"])
        fields = {
            **plain,
            "preprocessing": Preprocessing(**pixels),
            "layers": tuple(plain["layers"]),
        }
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How to run. None means "choose for me".

    workers: Ray workers; 0 runs in the calling process.
    gpus_per_worker: share of a GPU that each worker gets, 0 to 1; 0 keeps to the CPU.
    cpus_per_worker: CPU cores that each worker gets.
    address: a running Ray cluster ("auto", "HOST:PORT", "ray://..."); None starts a local one.
    batch_size: images in one forward pass.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: int | None = None
    address: str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"--workers {self.workers}: give a number from 0 up, or auto")
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker <= 1:
            raise UsageError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: give 0 to 1; "
                "a worker holds one model on one GPU, so use more workers for more GPUs"
            )
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise UsageError(f"--cpus-per-worker {self.cpus_per_worker}: give at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: give at least 1")
        if self.workers == 0 and self.address is not None:
            raise UsageError(
                "--workers 0 runs in this process and --address on a cluster: drop one of them"
            )
        if self.workers == 0 and self.gpus_per_worker not in (None, 0, 1):
            raise UsageError(
                "--workers 0 runs in this process, which cannot take a share of a GPU: "
                "give --gpus-per-worker 0 or 1, or at least one worker"
            )


@dataclass(frozen=True, kw_only=True)
class ExtractSpec:
    """One extraction, as a user asks for it.

    sources: directories (or single files) that hold the images.
    output: folder of the dataset; made if it is not there, resumed if it is.
    model: a name from `resfeat models`.
    weights: DEFAULT, a torchvision weights name, a .pth/.pt/.safetensors path, or random:SEED.
    shard_size: items in one shard; None takes 4,096, or less for a small collection.
    label_from: "parent" stores the name of each image's folder in a `label` column.
    max_error_rate: share of failed images (0 to 1) above which a finished run counts as bad; to be
        compared with `Report.error_rate`, as the command does.
    """

    sources: tuple[str, ...]
    output: str
    model: str = "resnet50"
    weights: str = "DEFAULT"
    shard_size: int | None = None
    label_from: Literal["parent"] | None = None
    max_error_rate: float = 0.05
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("no source given: name a directory of images")
        if not all(self.sources) or not self.output:
            raise UsageError("an empty path was given as source or output: is a variable not set?")
        if self.shard_size is not None and self.shard_size < 1:
            raise UsageError(f"--shard-size {self.shard_size}: give at least 1")
        if self.label_from not in (None, "parent"):
            raise UsageError(f"--label-from {self.label_from}: only 'parent' is known")
        if not 0 <= self.max_error_rate <= 1:
            raise UsageError(f"--max-error-rate {self.max_error_rate:g}: give a share from 0 to 1")
