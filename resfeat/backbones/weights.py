"""Weights: from what the user names to tensors, with their digest and the preprocessing they need.

Resolved once, on the driver, before any worker starts. Files are read without running code from
them: `.safetensors`, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from resfeat.backbones import build, check_name
from resfeat.errors import ResfeatError, UsageError
from resfeat.spec import Identity, Preprocessing

CONNECT_SECONDS = 10
FILE_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Weights:
    """Tensors that fit a backbone exactly, and all that goes with them.

    origin: a name that finds them again: "IMAGENET1K_V2", an absolute path, "random:0".
    """

    identity: Identity
    origin: str
    tensors: dict[str, Tensor]


def resolve(model: str, weights: str) -> Weights:
    """Find, read and check the weights that the user named.

    Raises UsageError for a name that means nothing, ResfeatError for weights that cannot be had or
    do not fit.
    """
    check_name(model)
    published = get_model_weights(model)
    preprocessing = _preprocessing(published.DEFAULT)
    if weights.startswith("random:"):
        origin, tensors = weights, _random(model, weights)
    elif weights.endswith(FILE_SUFFIXES):
        path = Path(weights).expanduser()
        origin, tensors = str(path.absolute()), _read(path)
    elif weights in published.__members__:
        entry = published[weights]
        origin, tensors = entry.name, _read(_download(entry))
        preprocessing = _preprocessing(entry)
    else:
        raise UsageError(
            f"unknown weights '{weights}' for {model}: give one of "
            f"{', '.join(published.__members__)}, a path that ends in {', '.join(FILE_SUFFIXES)}, "
            "or random:SEED"
        )
    tensors = {name: tensor for name, tensor in tensors.items() if _counts(name)}
    _check_fit(model, origin, tensors)
    identity = Identity(model=model, weights_digest=digest(tensors), preprocessing=preprocessing)
    return Weights(identity, origin, tensors)


def _counts(name: str) -> bool:
    """Whether a tensor has a say in embeddings: not the classifier, and not the count of training
    batches, which older checkpoints do not have."""
    return not name.startswith("fc.") and not name.endswith(".num_batches_tracked")


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values: the same for one set of weights in any file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _preprocessing(entry: WeightsEnum) -> Preprocessing:
    transforms = entry.transforms()
    return Preprocessing(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        interpolation=cast(
            'Literal["nearest", "bilinear", "bicubic"]', transforms.interpolation.value
        ),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _random(model: str, weights: str) -> dict[str, Tensor]:
    from resfeat.backbones.resnet import initialise

    seed = weights.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit()) or int(seed) >= 2**63:
        raise UsageError(f"weights '{weights}': give a whole number as seed, as in random:0")
    backbone = build(model)
    initialise(backbone, int(seed))
    return backbone.state_dict()


def _download(entry: WeightsEnum) -> Path:
    """The file of published weights in torch hub's cache, fetched if it is not there."""
    cached: Path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(entry.url)
    if cached.exists():
        return cached
    digest_start = cached.stem.rpartition("-")[2]  # published files carry it in their name
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(CONNECT_SECONDS):
            torch.hub.download_url_to_file(entry.url, str(cached), hash_prefix=digest_start)
    except (OSError, RuntimeError) as error:
        raise ResfeatError(
            f"cannot download {entry.url} ({getattr(error, 'reason', error)}): put the file at "
            f"{cached}, or give --weights PATH"
        ) from error
    return cached


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torch.hub passes no timeout of its own, and without one a silent network hangs the run.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    # What the two readers raise for a broken or hostile file has no common class.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ResfeatError(
            f"cannot read weights {path}: {reason[:200]}; only plain tensors are loaded, "
            "code in a checkpoint is never run"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for name, tensor in content.items()
    ):
        raise ResfeatError(
            f"weights {path} are not a flat state dict: save `model.state_dict()` and give that"
        )
    return {name: tensor.detach().float().contiguous() for name, tensor in content.items()}


def _check_fit(model: str, origin: str, tensors: dict[str, Tensor]) -> None:
    """Exactly the backbone's tensors, each of its shape, all finite."""
    with torch.device("meta"):
        expected = {name: t for name, t in build(model).state_dict().items() if _counts(name)}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(wanted.shape)}"
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ResfeatError(
            f"weights {origin} do not fit {model}: {', '.join(wrong[:3])}{more}; "
            "give the --model that they were trained for"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ResfeatError(f"weights {origin}: {name} has values that are not finite numbers")
