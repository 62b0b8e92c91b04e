"""Bytes to pixels."""

from resfeat.decoding.careful import CarefulDecoder
from resfeat.decoding.decode import Picture, decode, decode_image, quiet
from resfeat.decoding.load import Decoder, Loaded, load, loaded
from resfeat.decoding.pillow import MAX_PIXELS
from resfeat.decoding.room import PIXEL_BYTES, Room

__all__ = [
    "MAX_PIXELS",
    "PIXEL_BYTES",
    "CarefulDecoder",
    "Decoder",
    "Loaded",
    "Picture",
    "Room",
    "decode",
    "decode_image",
    "load",
    "loaded",
    "quiet",
]
