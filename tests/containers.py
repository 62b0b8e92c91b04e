"""HEIC as pillow-heif writes it, and what can be done to the boxes of a HEIC or an AVIF."""

from __future__ import annotations

import io
import struct
from typing import Any

import pillow_heif
from PIL import Image

LOSSLESS = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}


def heic(*pictures: Image.Image, **options: Any) -> bytes:
    """A HEIC; `tile_size` has it in tiles, as phones write it."""
    buffer, file = io.BytesIO(), pillow_heif.HeifFile()
    for picture in pictures:
        file.add_from_pillow(picture)
    file.save(buffer, **options)
    return buffer.getvalue()


def deep_heic(mode: str, size: tuple[int, int], samples: bytes, bits: int) -> bytes:
    """A HEIC of 10 or 12 bits from 16-bit samples; mode as pillow-heif has it, "RGB;16"."""
    buffer = io.BytesIO()
    pillow_heif.from_bytes(mode, size, samples).save(buffer, bit_depth=bits, **LOSSLESS)
    return buffer.getvalue()


def avif(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "AVIF", **options)
    return buffer.getvalue()


def declaring(data: bytes, width: int, height: int) -> bytes:
    """The same file with another size of its picture and of all its tiles."""
    changed, at = bytearray(data), 0
    while (at := changed.find(b"ispe", at + 1)) > 0:
        changed[at + 8 : at + 16] = struct.pack(">II", width, height)
    return bytes(changed)


def with_notes(data: bytes, count: int, size: int) -> bytes:
    """A HEIC of one picture, which so many items of EXIF describe: each of them the same bytes."""
    numbers = range(2, count + 2)
    notes = [(number, b"Exif", size) for number in numbers]
    references = [_box(b"cdsc", struct.pack(">HHH", number, 1, 1)) for number in numbers]
    return _with_items(data, notes, references, bytes(size))


def of_layers(data: bytes, count: int, width: int, height: int) -> bytes:
    """A HEIC that shows a picture of this size so many times, each time above the last."""
    overlay = struct.pack(">BB4HII", 0, 1, 0, 0, 0, 0, width, height) + bytes(8 * count)
    reference = _box(b"dimg", struct.pack(f">{2 + count}H", 2, count, *[1] * count))
    return _with_items(data, [(2, b"iovl", len(overlay))], [reference], overlay, primary=2)


def _with_items(
    data: bytes,
    items: list[tuple[int, bytes, int]],
    references: list[bytes],
    added: bytes,
    primary: int = 1,
) -> bytes:
    """A HEIC of one picture with further items, of a number, a kind and a size: the data of each
    are what is added."""
    ftyp, properties, coded = (_box_in(data, kind) for kind in (b"ftyp", b"iprp", b"mdat"))
    names = [_item(1, b"hvc1"), *(_item(number, kind) for number, kind, _ in items)]
    start = 0
    for _ in range(2):  # at first to see how long it is
        behind = start + len(coded) - 8
        pieces = [
            (1, start, len(coded) - 8),
            *((number, behind, size) for number, _, size in items),
        ]
        places = [struct.pack(">HHHII", number, 0, 1, *place) for number, *place in pieces]
        meta = _box(
            b"meta",
            bytes(4),
            _box(b"hdlr", bytes(8), b"pict", bytes(13)),
            _box(b"pitm", bytes(4), struct.pack(">H", primary)),
            _box(b"iloc", bytes(4), b"\x44\0", struct.pack(">H", len(pieces)), *places),
            _box(b"iinf", bytes(4), struct.pack(">H", len(names)), *names),
            _box(b"iref", bytes(4), *references),
            properties,
        )
        start = len(ftyp + meta) + 8
    return ftyp + meta + _box(b"mdat", coded[8:], added)


def _item(number: int, kind: bytes) -> bytes:
    return _box(b"infe", b"\2\0\0\0", struct.pack(">HH", number, 0), kind, b"\0")


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def _box_in(data: bytes, kind: bytes) -> bytes:
    at = data.index(kind) - 4
    return data[at : at + int.from_bytes(data[at : at + 4], "big")]
