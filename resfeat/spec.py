"""What is asked for: the identity of an embedding, and how to run.

`Identity` is everything that decides what an embedding *is*: it is hashed into the fingerprint and
never changes within a dataset. `FeatureSpec` is an identity as a user asks for it, with defaults
still to be filled in from the weights. `RuntimeOptions` may change between a run and its resume,
and so may `min_parity`, `max_error_rate` and `retry_failed`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any, Literal, Self, get_args

from resfeat.errors import UsageError

# Bumped whenever decode.py would give other pixels for the same file.
PIXEL_POLICY = "2"

# The columns of a dataset that nothing carried may be called; nor may it begin like an embedding.
OWN_COLUMNS = ("id", "width", "height", "size", "mtime", "uri", "stage", "reason", "message")

WEIGHTS = "DEFAULT, the name of published ones, a path or an address, or random:SEED"

# Of a side that a network is given: far beyond any, and still no way to exhaust the memory.
MOST_PIXELS = 4096

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Pool = Literal["avg", "max", "gem"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
DType = Literal["float32", "float16"]
Decode = Literal["turbo", "pillow"]
RuntimeName = Literal["torch", "openvino"]


# How many workers one GPU may be divided among, and what may be left over of it: with 0.33 each, a
# hundredth is.
MOST_ON_A_GPU = 100
LEFT_OVER = 0.01


def _check_range(name: str, value: float | None, least: float, most: float, hint: str) -> None:
    """Raise UsageError where an option was given and lies outside of least to most."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"--{name} {value:.15g}: give {hint}")


def workers_on_a_gpu(share: float) -> int:
    """How many workers with such a share of a GPU, above 0, one GPU has room for."""
    return int(min(1 / share + 1e-9, MOST_ON_A_GPU))


def share_of_a_gpu(workers: int) -> float:
    """The share that so many workers on one GPU have. Ray counts in ten-thousandths, and rounds: of
    1/6, six would be more than it has."""
    return (10_000 // workers) / 10_000


def _check_share(share: float) -> None:
    """Raise UsageError for a share that leaves part of each GPU to nobody."""
    workers = workers_on_a_gpu(share)
    unused = 1 - workers * share
    if unused > LEFT_OVER + 1e-9:
        smaller, larger = share_of_a_gpu(workers + 1), share_of_a_gpu(workers)
        raise UsageError(
            f"--gpus-per-worker {share:g} leaves {unused:.0%} of each GPU unused: give {smaller:g} "
            f"({workers + 1} workers to a GPU) or {larger:g} ({workers})"
        )


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Pixels as the weights were trained on: resized, cropped in the centre, normalised."""

    resize: int  # of the short side, in pixels
    crop: int
    interpolation: Interpolation
    mean: tuple[float, float, float]  # both per RGB channel, for pixels scaled to 0..1
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides what an embedding is."""

    model: str
    weights_digest: str
    preprocessing: Preprocessing
    decode: Decode = "turbo"  # how pixels came about, see `decode.py`
    pixel_policy: str = PIXEL_POLICY  # the version of that
    layers: tuple[str, ...] = ("avgpool",)
    pool: str = "avg"  # of feature maps, or "own" for a network that pools in its own way
    normalize: bool = False  # whether each embedding was scaled to an L2 norm of 1
    precision: Precision = "fp32"  # of the forward pass
    dtype: DType = "float32"  # of the stored values

    @property
    def last_layer(self) -> str:
        """The layer that is meant where none is named."""
        return self.layers[-1]

    @property
    def columns(self) -> dict[str, str]:
        """Name of the column that holds each layer's embedding, in order."""
        if len(self.layers) == 1:
            return {self.layers[0]: "embedding"}
        return {layer: f"embedding_{layer}" for layer in self.layers}

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
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        pixels = Preprocessing(**_with_tuples(plain["preprocessing"]))
        return cls(**{**_with_tuples(plain), "preprocessing": pixels})


def _with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """The features that a user asks for; `backbones.weights.resolve` makes an identity of them.

    model: a name from `resfeat models`.
    weights: DEFAULT, a published name, a .pth/.pt/.safetensors path or URI, or random:SEED.
    layers: taps of the model, one embedding each; None takes its last.
    pool: how a feature map becomes a vector; None averages it, or leaves it to a network that has
        a way of its own.
    normalize: scale each embedding to an L2 norm of 1.
    precision: of the forward pass. dtype: of the stored values.
    resize, crop, interpolation: in place of those that belong to the weights; pixels.
    decode: "turbo" is fast, "pillow" gives torchvision's pixels to the last bit.
    """

    model: str = "resnet50"
    weights: str = "DEFAULT"
    layers: tuple[str, ...] | None = None
    pool: Pool | None = None
    normalize: bool = False
    precision: Precision = "fp32"
    dtype: DType = "float32"
    resize: int | None = None
    crop: int | None = None
    interpolation: Interpolation | None = None
    decode: Decode = "turbo"

    def __post_init__(self) -> None:
        for name, hint in ("model", "a name from `resfeat models`"), ("weights", WEIGHTS):
            if not isinstance(value := getattr(self, name), str):
                raise UsageError(f"--{name} {value}: give {hint}")
        if self.layers is not None and (not self.layers or not all(self.layers)):
            raise UsageError("--layers has an empty name: give some, as in layer3,avgpool")
        choices = {"pool": Pool, "precision": Precision, "dtype": DType,
                   "interpolation": Interpolation, "decode": Decode}  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(known):
                raise UsageError(f"--{name} {value}: give one of {', '.join(get_args(known))}")
        for name in ("resize", "crop"):
            _check_range(name, getattr(self, name), 1, MOST_PIXELS, f"1 to {MOST_PIXELS} pixels")

    @classmethod
    def of(cls, identity: Identity, weights: str) -> Self:
        """What asks for this identity again, given where its weights are found."""
        asked = vars(identity) | vars(identity.preprocessing) | {"weights": weights}
        if identity.pool == "own":
            asked["pool"] = None
        return cls(**{each.name: asked[each.name] for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How to run. None means "choose for me".

    workers: Ray workers; 0 runs in the calling process.
    gpus_per_worker: share of a GPU that each worker gets, 0 to 1; 0 keeps to the CPU. None has
        several workers share each GPU, about two CPU cores to a worker.
    cpus_per_worker: CPU cores that each worker gets.
    address: a running Ray cluster ("auto" or "HOST:PORT"); None starts a local one.
    runtime: what runs the network, "torch" or "openvino".
    batch_size: images in one forward pass; on a GPU that is `runtimes.GPU_BATCH`, and this is
        rounded up to a multiple of it.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: int | None = None
    address: str | None = None
    runtime: RuntimeName | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _check_range("workers", self.workers, 0, inf, "a number from 0 up, or auto")
        hint = "0 to 1; a worker holds one model on one GPU, so use more workers for more GPUs"
        _check_range("gpus-per-worker", self.gpus_per_worker, 0, 1, hint)
        _check_range("cpus-per-worker", self.cpus_per_worker, 1, inf, "at least 1")
        if self.runtime not in (None, *get_args(RuntimeName)):
            known = ", ".join(get_args(RuntimeName))
            raise UsageError(f"--runtime {self.runtime}: give one of auto, {known}")
        _check_range("batch-size", self.batch_size, 1, inf, "at least 1")
        if self.workers == 0 and self.address is not None:
            raise UsageError(
                "--workers 0 runs in this process and --address on a cluster: drop one of them"
            )
        if self.workers == 0 and self.gpus_per_worker not in (None, 0, 1):
            raise UsageError(
                "--workers 0 runs in this process, which cannot take a share of a GPU: "
                "give --gpus-per-worker 0 or 1, or at least one worker"
            )
        if self.gpus_per_worker:
            _check_share(self.gpus_per_worker)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is made of the sources, beside their images.

    label_from: "parent" stores the name of each image's folder in a `label` column.
    keep: columns of tables, and files beside an image in a tar ("json", "txt", "cls"), that are
        stored with the embeddings, unchanged.
    uri_column: of tables, the column that says where the images are.
    image_column: of Parquet and Arrow files, the column that holds the images themselves.
    id_column: of either, the column that becomes the `id`.
    """

    label_from: Literal["parent"] | None = None
    keep: tuple[str, ...] = ()
    uri_column: str | None = None
    image_column: str | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        if self.label_from not in (None, "parent"):
            raise UsageError(f"--label-from {self.label_from}: only 'parent' is known")
        if not all(self.keep):
            raise UsageError("--keep has an empty name: give some, as in caption,source")
        if len(set(self.keep)) < len(self.keep):
            raise UsageError("--keep names a column twice: give each once")
        taken = [name for name in self.keep if name in OWN_COLUMNS or name.startswith("embedding")]
        if self.label_from and "label" in self.keep:
            taken = ["label"]
        if taken:
            raise UsageError(
                f"--keep {taken[0]}: resfeat writes a column of that name: leave it out"
            )
        if self.uri_column and self.image_column:
            raise UsageError(
                "--uri-column says where images are and --image-column what holds them: give one"
            )


@dataclass(frozen=True, kw_only=True)
class ExtractSpec(FeatureSpec, SourceOptions):
    """One extraction, as a user asks for it: the features, and what follows.

    sources: directories, prefixes, tars, tables, or single images.
    output: folder of the dataset; made if it is not there, resumed if it is.
    shard_size: items in one shard; None takes 4,096, or less for a small collection.
    max_error_rate: share of failed images (0 to 1) above which a finished run counts as bad; to be
        compared with `Report.error_rate`, as the command does.
    retry_failed: do the images that failed once more, beside what is not done.
    update: list the sources again, and bring the dataset to what they hold now.
    max_gone: share of its images (0 to 1) whose removal by an update is not taken for a mishap.
    partition: "i/n" does each n-th shard, beside other runs on the same output; "auto" and "auto/n"
        take i, and n, from the variables of a Slurm array or an indexed job of Kubernetes.
    min_parity: least cosine (-1 to 1) to fp32 on torch that a sample of the images must have, where
        the run uses anything else; None asks for 0.999, or 0.99 with int8.
    """

    sources: tuple[str, ...]
    output: str
    shard_size: int | None = None
    max_error_rate: float = 0.05
    retry_failed: bool = False
    update: bool = False
    max_gone: float = 0.1
    partition: str | None = None
    min_parity: float | None = None
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    @property
    def source_options(self) -> SourceOptions:
        """Those of its fields, by themselves."""
        return SourceOptions(
            **{each.name: getattr(self, each.name) for each in fields(SourceOptions)}
        )

    def __post_init__(self) -> None:
        FeatureSpec.__post_init__(self)
        SourceOptions.__post_init__(self)
        if not self.sources:
            raise UsageError("no source given: name a directory of images")
        if not all(self.sources) or not self.output:
            raise UsageError("an empty path was given as source or output: is a variable not set?")
        _check_range("shard-size", self.shard_size, 1, inf, "at least 1")
        _check_range("max-error-rate", self.max_error_rate, 0, 1, "a share from 0 to 1")
        _check_range("max-gone", self.max_gone, 0, 1, "a share from 0 to 1")
        if self.update and self.partition is not None:
            raise UsageError(
                "--update is for the whole dataset and --partition for a part of it: give --update "
                "alone, once all partitions are done"
            )
        _check_range("min-parity", self.min_parity, -1, 1, "a cosine, at most 1")
