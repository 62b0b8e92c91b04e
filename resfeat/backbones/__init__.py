"""The networks that give embeddings, by name. Only building one imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resfeat.errors import UsageError

if TYPE_CHECKING:
    from resfeat.backbones.resnet import ResNet

# name -> depth of the ResNet. The names are torchvision's, which is where their weights are found.
BACKBONES: dict[str, int] = {f"resnet{depth}": depth for depth in (18, 34, 50, 101, 152)}


def check_name(name: str) -> None:
    """Raise UsageError if no backbone has this name."""
    if name not in BACKBONES:
        raise UsageError(
            f"unknown model '{name}': choose one of {', '.join(BACKBONES)} (see `resfeat models`)"
        )


def build(name: str) -> ResNet:
    """The named backbone with uninitialised weights, in eval mode."""
    check_name(name)
    from resfeat.backbones.resnet import ResNet

    return ResNet(BACKBONES[name]).eval()
