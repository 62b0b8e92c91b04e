"""What every network here offers, and the wrapper that makes another library's network offer it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn


class Backbone(nn.Module):
    """A network without its classifier.

    taps: names of the outputs that it can give, in order; the last is its embedding. head: modules
    of the classifier that was left out.
    """

    taps: tuple[str, ...]
    head: tuple[str, ...]

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """The named outputs for pictures float [N, 3, H, W]: feature maps [N, C, h, w], which are
        still to be pooled, or vectors [N, D]."""
        raise NotImplementedError


class Adapted(Backbone):
    """A network of another library; it gives what its classifier would have been given.

    Its parameters keep their names.
    """

    taps = ("pre_logits",)

    def __init__(self, network: nn.Module, head: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        return {"pre_logits": self.network(x)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(state_dict, *args, **kwargs)
