"""Is the embedding the right one: parity with fp32, and the calibration of int8, on a sample of the
dataset's own images."""

from resfeat.fidelity.calibration import calibrate, is_intact
from resfeat.fidelity.parity import (
    Parity,
    Reference,
    check,
    compare,
    differs,
    reference,
)

__all__ = ["Parity", "Reference", "calibrate", "check", "compare", "differs", "is_intact",
           "reference"]  # fmt: skip
