"""Bytes to pixels."""

from resfeat.decoding.careful import CarefulDecoder
from resfeat.decoding.decode import Picture, decode

__all__ = [
    "CarefulDecoder",
    "Picture",
    "decode",
]
