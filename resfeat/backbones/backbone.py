"""What every network here offers, and the wrapper that makes another library's network offer it."""

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """A network without its classifier."""

    taps: tuple[str, ...]  # names of the outputs that it gives, in order; the last is its embedding
    head: tuple[str, ...]  # modules of the classifier that was left out

    def current(self, name: str) -> str:
        """The name that a parameter has today, given its name in an older checkpoint."""
        return name

    def shapes(self, crop: int) -> dict[str, tuple[int, ...]]:
        """As `backbones.shapes`, for a network on torch's meta device."""
        with torch.inference_mode():
            outputs = self(torch.empty(1, 3, crop, crop, device="meta"), self.taps)
        return {tap: tuple(output.shape[1:]) for tap, output in outputs.items()}

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def gflops(self, crop: int) -> float:
        """Billions of multiply-adds for one picture, for a network on torch's meta device."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.shapes(crop)
        return float(counter.get_total_flops()) / 2 / 1e9

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """The named outputs for pictures float [N, 3, H, W]: feature maps [N, C, h, w], not yet
        pooled, or vectors [N, D]."""
        raise NotImplementedError


class Adapted(Backbone):
    """A network of another library, which gives the input of its classifier. Parameters keep their
    names. renamed: patterns of older names, and their replacements."""

    taps = ("pre_logits",)

    def __init__(self, network: nn.Module, head: tuple[str, ...], renamed: Mapping[str, str]):
        super().__init__()
        self.network, self.head, self._renamed = network, head, renamed

    def current(self, name: str) -> str:
        for pattern, today in self._renamed.items():
            name = re.sub(pattern, today, name)
        return name

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        return {"pre_logits": self.network(x)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Some networks look up in the metadata which version of theirs the tensors are of.
        versioned = OrderedDict(state_dict)
        versioned._metadata = self.network.state_dict()._metadata  # type: ignore[attr-defined]
        return self.network.load_state_dict(versioned, *args, **kwargs)
