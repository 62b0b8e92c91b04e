"""Is the embedding the right one: parity with fp32, and the calibration of int8, on a sample of the
dataset's own images."""

from resfeat.fidelity.calibration import calibrate, is_intact
from resfeat.fidelity.parity import (
    Parity,
    Reference,
    check,
    compare,
    differs,
    may_differ,
    reference,
)

__all__ = ["Parity", "Reference", "calibrate", "check", "compare", "differs", "is_intact",
           "may_differ", "reference"]  # fmt: skip
