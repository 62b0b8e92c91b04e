"""Bytes to pixels."""

from resfeat.decoding.careful import CarefulDecoder
from resfeat.decoding.decode import Picture, decode, quiet
from resfeat.decoding.load import Loaded, load

__all__ = ["CarefulDecoder", "Loaded", "Picture", "decode", "load", "quiet"]
