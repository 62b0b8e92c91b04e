"""Bytes to pixels."""

from resfeat.decoding.careful import CarefulDecoder
from resfeat.decoding.decode import Picture, decode, quiet
from resfeat.decoding.load import Decoder, Loaded, load

__all__ = ["CarefulDecoder", "Decoder", "Loaded", "Picture", "decode", "load", "quiet"]
