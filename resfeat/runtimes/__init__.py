"""One model on one device: pixels in, embeddings out; and which precisions each runtime offers."""

from __future__ import annotations

from resfeat.errors import UsageError
from resfeat.spec import Precision

# What every embedding is checked against: torch in this precision.
REFERENCE: Precision = "fp32"
OFFERED = {"torch": (REFERENCE, "bf16", "fp16")}


def check_precision(precision: str) -> None:
    """Raise UsageError where no runtime offers the precision."""
    offered = [each for precisions in OFFERED.values() for each in precisions]
    if precision not in offered:
        raise UsageError(
            f"no runtime here offers --precision {precision}: give one of {', '.join(offered)}"
        )
