"""torchvision's classification networks, headless, and the weights that it publishes."""

import os
import socket
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from resfeat.backbones import Published
from resfeat.backbones.backbone import Adapted, Backbone
from resfeat.backbones.checkpoint import read_tensors
from resfeat.errors import ResfeatError
from resfeat.spec import Interpolation, Preprocessing

CLASSES = 1000
CONNECT_SECONDS = 10
# Their published weights want values from -1 to 1. torchvision normalises as for others, and undoes
# that before the first layer (`transform_input`). Here it is not done at all.
FROM_MINUS_ONE_TO_ONE = ("googlenet", "inception_v3")
# Names in files of older versions. torchvision renames them while it loads them.
RENAMED = {
    r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.": r"\1\2.",
    r"\.mlp\.linear_1\.": ".mlp.0.",
    r"\.mlp\.linear_2\.": ".mlp.3.",
}


def names() -> list[str]:
    return list(zoo.list_models(module=zoo))


def has(name: str) -> bool:
    return name in names()


def build(name: str, crop: int) -> Backbone:
    options: dict[str, Any] = {"image_size": crop} if name.startswith("vit_") else {}
    if name in FROM_MINUS_ONE_TO_ONE:
        options["aux_logits"] = False
    with warnings.catch_warnings():  # of a coming change in how values are initialised
        warnings.simplefilter("ignore", FutureWarning)
        network = zoo.get_model(name, **options)
    # The classifier is the last module with an output for each class.
    head = [
        key
        for key, module in network.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == CLASSES)
        or (isinstance(module, nn.Conv2d) and module.out_channels == CLASSES)
    ][-1]
    network.set_submodule(head, nn.Identity())
    return Adapted(network, (head,), RENAMED)


def published(name: str) -> dict[str, Published]:
    entries = zoo.get_model_weights(name)
    return {
        entry.name: Published(entry.name, _preprocessing(name, entry), partial(_read, entry))
        for entry in (entries.DEFAULT, *entries)
    }


def default_pixels(name: str) -> Preprocessing:
    return _preprocessing(name, zoo.get_model_weights(name).DEFAULT)


def _preprocessing(name: str, entry: zoo.WeightsEnum) -> Preprocessing:
    transforms = entry.transforms()
    halves = (0.5, 0.5, 0.5) if name in FROM_MINUS_ONE_TO_ONE else None
    return Preprocessing(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        interpolation=cast(Interpolation, transforms.interpolation.value),
        mean=halves or tuple(transforms.mean),
        std=halves or tuple(transforms.std),
    )


def file_of(name: str, weights: str) -> Path:
    """Where torch hub keeps the file of a network's published weights, once it is there."""
    return _file_of(zoo.get_model_weights(name)[weights])


def _file_of(entry: zoo.WeightsEnum) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url))


def _read(entry: zoo.WeightsEnum) -> dict[str, Tensor]:
    """The tensors of the file in torch hub's cache. Downloads it if it is not there."""
    cached = _file_of(entry)
    if not cached.exists():
        _download(entry, cached)
    return read_tensors(str(cached))[0]


def _download(entry: zoo.WeightsEnum, cached: Path) -> None:
    digest_start = cached.stem.rpartition("-")[2]
    timeout = socket.getdefaulttimeout()
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub sets no timeout: a silent network would hang the run.
        socket.setdefaulttimeout(CONNECT_SECONDS)
        torch.hub.download_url_to_file(entry.url, str(cached), hash_prefix=digest_start)
    except (OSError, RuntimeError) as error:
        raise ResfeatError(
            f"cannot download {entry.url} ({getattr(error, 'reason', error)}): put the file at "
            f"{cached}, or give --weights PATH"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
