"""The head of a plain JPEG, read in a small part of the time that Pillow takes.

Plain is what cameras, phones and the web write: baseline or progressive, 8 bits, grey or of three
colours, each segment as it should be. Whatever leaves a doubt is left to Pillow, which also says
what is wrong with it, so that every file has the outcome that it has by Pillow.
"""

import struct
from collections.abc import Mapping
from typing import NamedTuple

from resfeat.decoding.pillow import UPRIGHT, Turn, turn_for

# Segments that tell nothing of the picture: tables, comments, what applications add.
_PASSED_OVER = frozenset({0xC4, 0xDD, 0xFE, *range(0xE3, 0xED), 0xEF})
_JFIF, _EXIF, _PROFILE, _ADOBE, _TABLES, _SCAN = 0xE0, 0xE1, 0xE2, 0xEE, 0xDB, 0xDA
_FRAMES: Mapping[int, bool] = {0xC0: False, 0xC1: False, 0xC2: True}  # whether it is progressive
# The least length of what Pillow looks into, by how it begins.
_LEAST = {_JFIF: (b"JFIF", 12), _PROFILE: (b"ICC_PROFILE\0", 14), _ADOBE: (b"Adobe", 12)}

_SEGMENT = struct.Struct(">HH")  # its marker, and its length without that
_ORIENTATION, _SHORT = 0x0112, 3
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # TIFF's types


class Head(NamedTuple):
    """As the picture is stored; turn: how it is to be shown."""

    width: int
    height: int
    turn: Turn
    progressive: bool


def head_of(data: bytes) -> Head | None:
    """The head of a plain JPEG; None for any other file."""
    if data[:2] != b"\xff\xd8":
        return None
    at, turn, frame, last = 2, None, None, len(data) - 4
    while at <= last:
        marker, length = _SEGMENT.unpack_from(data, at)
        kind, start, end = marker - 0xFF00, at + 4, at + 2 + length
        if kind < 0 or end > len(data) or length < 2:
            return None
        if kind in _PASSED_OVER:
            pass
        elif kind in _FRAMES and frame is None:
            bits, height, width, colours = struct.unpack_from(">BHHB", data, start)
            if bits != 8 or colours not in (1, 3) or end - start != 6 + 3 * colours:
                return None
            frame = width, height, _FRAMES[kind]
        elif kind == _TABLES:
            # Of 64 bytes each, behind one that says so.
            if (end - start) % 65 or any(first > 15 for first in data[start:end:65]):
                return None
        elif kind == _EXIF and turn is None and data[start : start + 6] == b"Exif\0\0":
            if (turn := _turn(data[start + 6 : end])) is None:
                return None
        elif kind in _LEAST:
            begins, least = _LEAST[kind]
            if not data.startswith(begins, start) or end - start < least:
                return None
        elif kind == _SCAN and frame:
            width, height, progressive = frame
            return Head(width, height, turn or UPRIGHT, progressive)
        else:
            return None
        at = end
    return None


def _turn(exif: bytes) -> Turn | None:
    """What EXIF says of the orientation; None where that leaves a doubt."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    if at + 2 + 12 * count > len(exif):
        return None
    for tag, kind, values, offset in struct.iter_unpack(
        f"{order}HHII", exif[at + 2 : at + 2 + 12 * count]
    ):
        if tag == _ORIENTATION:
            value = offset & 0xFFFF if order == "<" else offset >> 16
            return turn_for(value) if (kind, values) == (_SHORT, 1) else None
        # Pillow reads no further than to a value that is not there.
        size = values * _SIZES.get(kind, len(exif))
        if size > 4 and offset + size > len(exif):
            return None
    return UPRIGHT
