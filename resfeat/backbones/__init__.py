"""The networks that give embeddings, by name.

Ours are a plain dict of architectures; `torchvision:NAME` and `timm:NAME` are those libraries' own
networks without their classifiers. Nothing here imports torch until a network is built, or a
family of another library is asked.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

from resfeat.errors import UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from resfeat.backbones.architecture import Architecture
    from resfeat.backbones.backbone import Backbone
    from resfeat.spec import Preprocessing

FAMILIES = {"": "ours", "torchvision": "torchvision", "timm": "timm"}


@dataclass(frozen=True)
class Published:
    """Weights that somebody published: their preprocessing, and how to read them."""

    name: str
    preprocessing: Preprocessing
    read: Callable[[], Mapping[str, Tensor]]


class Family(Protocol):
    """The functions of a family's module."""

    def names(self) -> list[str]: ...
    def has(self, name: str) -> bool: ...
    # The headless network, uninitialised, for pictures of crop x crop pixels.
    def build(self, name: str, crop: int) -> Backbone: ...
    def published(self, name: str) -> dict[str, Published]: ...  # by name, the default first
    def default_pixels(self, name: str) -> Preprocessing: ...  # for weights of the user's own


def family_of(model: str) -> Family:
    """The family that a model's prefix names. Raises UsageError for an unknown prefix."""
    prefix = model.rpartition(":")[0]
    if prefix not in FAMILIES:
        raise UsageError(
            f"unknown model '{model}': only torchvision: and timm: may stand before a name"
        )
    return cast("Family", importlib.import_module(f"resfeat.backbones.{FAMILIES[prefix]}"))


def check_name(model: str) -> None:
    """Raise UsageError for a misspelt name, in no time. Of torchvision: and timm: only the prefix
    is checked, since those libraries take seconds to import."""
    if model.rpartition(":")[0] not in ("torchvision", "timm"):
        find(model)


def find(model: str) -> tuple[Family, str]:
    """The family of a model, and the model's name in it. Raises UsageError if there is none."""
    family = family_of(model)
    prefix, colon, name = model.rpartition(":")
    if not family.has(name):
        near = difflib.get_close_matches(name, family.names(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(prefix + colon + each for each in near)}? " if near else ""
        raise UsageError(f"unknown model '{model}': {hint}see `resfeat models`")
    return family, name


def build(model: str, crop: int) -> Backbone:
    """The named network, in eval mode, for pictures of crop x crop pixels; values arbitrary."""
    family, name = find(model)
    return family.build(name, crop).eval()


@cache
def outline(model: str, crop: int) -> Backbone:
    """The network without values, on torch's meta device: for shapes and counts."""
    from torch import device, empty, ones, zeros
    from torch.overrides import TorchFunctionMode

    class NoMemory(TorchFunctionMode):
        # Not `with device("meta")`: some networks compute their own widths with tensors.
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            where = {"device": device("meta")} if func in (empty, ones, zeros) else {}
            return func(*args, **{**(kwargs or {}), **where})

    with NoMemory():
        network = build(model, crop)
    return network.to("meta")


def numbers(model: str, crop: int) -> Architecture | Backbone:
    """What has a network's shapes and counts: worked out for ours, measured for others."""
    from resfeat.backbones.ours import BACKBONES

    return BACKBONES.get(model) or outline(model, crop)


def shapes(model: str, crop: int) -> dict[str, tuple[int, ...]]:
    """What each tap gives for one picture: (C, h, w) for a feature map, (D,) for a vector. Raises
    UsageError if the network does not take pictures of this size."""
    find(model)
    try:
        return numbers(model, crop).shapes(crop)
    # Networks complain of a size in their own ways: assertions, shape errors, ...
    except Exception as error:
        raise UsageError(
            f"{model} does not take pictures of {crop} x {crop} pixels ({first_line(error)}): give "
            "another --crop, or leave it to the weights"
        ) from error
