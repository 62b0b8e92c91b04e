"""What every network here offers, and the wrapper that makes another library's network offer it."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """A network without its classifier.

    taps: names of the outputs that it can give, in order; the last is its embedding. head: modules
    of the classifier that was left out.
    """

    taps: tuple[str, ...]
    head: tuple[str, ...]

    def current(self, name: str) -> str:
        """The name that a parameter has today, given one that older checkpoints have."""
        return name

    def shapes(self, crop: int) -> dict[str, tuple[int, ...]]:
        """What each tap gives for one picture of crop x crop pixels: (C, h, w) for a feature map,
        (D,) for a vector. Of a network without values, on torch's meta device."""
        with torch.inference_mode():
            outputs = self(torch.empty(1, 3, crop, crop, device="meta"), self.taps)
        return {tap: tuple(output.shape[1:]) for tap, output in outputs.items()}

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """The named outputs for pictures float [N, 3, H, W]: feature maps [N, C, h, w], which are
        still to be pooled, or vectors [N, D]."""
        raise NotImplementedError


class Adapted(Backbone):
    """A network of another library; it gives what its classifier would have been given.

    Its parameters keep their names.
    """

    taps = ("pre_logits",)

    def __init__(
        self,
        network: nn.Module,
        head: tuple[str, ...],
        renamed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """renamed: patterns of names in older checkpoints, and what to put in their place."""
        super().__init__()
        self.network = network
        self.head = head
        self._renamed = renamed

    def current(self, name: str) -> str:
        for pattern, today in self._renamed.items():
            name = re.sub(pattern, today, name)
        return name

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        return {"pre_logits": self.network(x)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Some networks look up there which of their versions the tensors are of.
        versioned = OrderedDict(state_dict)
        versioned._metadata = self.network.state_dict()._metadata  # type: ignore[attr-defined]
        return self.network.load_state_dict(versioned, *args, **kwargs)
