"""Our own networks by name, and the weights that torchvision publishes for some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from resfeat.backbones import Published
from resfeat.backbones.architecture import Architecture, cifar, imagenet
from resfeat.spec import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

    from resfeat.backbones.backbone import Backbone

# torchvision has these too, under the same names, and publishes their weights.
LIKE_TORCHVISION: dict[str, Architecture] = {
    **{f"resnet{depth}": imagenet(depth) for depth in (18, 34, 50, 101, 152)},
    "wide_resnet50_2": imagenet(50, group_width=128),
    "wide_resnet101_2": imagenet(101, group_width=128),
    "resnext50_32x4d": imagenet(50, groups=32, group_width=4),
    "resnext101_32x8d": imagenet(101, groups=32, group_width=8),
    "resnext101_64x4d": imagenet(101, groups=64, group_width=4),
}
CIFAR_DEPTHS = (20, 32, 44, 56)
BACKBONES: dict[str, Architecture] = {
    **LIKE_TORCHVISION,
    # Table 3 compares the three kinds of shortcut; the plain networks have none.
    **{f"resnet{depth}_{kind.lower()}": imagenet(depth, shortcut=kind)
       for depth in (18, 34) for kind in "AC"},
    **{f"plain{depth}": imagenet(depth, shortcut="none") for depth in (18, 34)},
    **{f"highway{depth}": imagenet(depth, shortcut="highway") for depth in (18, 34)},
    **{f"cifar_resnet{depth}": cifar(depth) for depth in (*CIFAR_DEPTHS, 110, 1202)},
    **{f"cifar_resnet{depth}_b": cifar(depth, "B") for depth in (*CIFAR_DEPTHS, 110, 1202)},
    **{f"cifar_resnet{depth}_c": cifar(depth, "C") for depth in (*CIFAR_DEPTHS, 110, 1202)},
    **{f"cifar_plain{depth}": cifar(depth, "none") for depth in CIFAR_DEPTHS},
    **{f"cifar_highway{depth}": cifar(depth, "highway") for depth in CIFAR_DEPTHS},
}  # fmt: skip

# Means and standard deviations of the two training sets, as they are commonly used.
IMAGENET = Preprocessing(resize=256, crop=224, interpolation="bilinear",
                         mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # fmt: skip
CIFAR = Preprocessing(resize=32, crop=32, interpolation="bilinear",
                      mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))  # fmt: skip

# What torchvision publishes, the default first. Written down, since asking it takes seconds.
_V1 = {"IMAGENET1K_V1": IMAGENET}
_V2 = {"IMAGENET1K_V2": replace(IMAGENET, resize=232)}
_PUBLISHED: dict[str, dict[str, Preprocessing]] = {
    **dict.fromkeys(LIKE_TORCHVISION, _V2 | _V1),
    **dict.fromkeys(("resnet18", "resnet34"), _V1),
    "resnext101_64x4d": {"IMAGENET1K_V1": replace(IMAGENET, resize=232)},
}


def names() -> list[str]:
    return list(BACKBONES)


def has(name: str) -> bool:
    return name in BACKBONES


def build(name: str, crop: int) -> Backbone:
    from resfeat.backbones.resnet import ResNet

    return ResNet(BACKBONES[name])


def published(name: str) -> dict[str, Published]:
    return {
        weights: Published(weights, pixels, partial(_read, name, weights))
        for weights, pixels in _PUBLISHED.get(name, {}).items()
    }


def default_pixels(name: str) -> Preprocessing:
    otherwise = CIFAR if BACKBONES[name].stem == "cifar" else IMAGENET
    return next(iter(_PUBLISHED.get(name, {}).values()), otherwise)


def _read(name: str, weights: str) -> Mapping[str, Tensor]:
    from resfeat.backbones import torchvision

    return torchvision.published(name)[weights].read()
