"""Files that give no embedding, made here, each with the reason that it must be given."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

from PIL import Image

# file name -> (stage, reason)
EXPECTED = {
    "empty.jpg": ("read", "empty"),
    "dangling.jpg": ("read", "not_found"),
    "pipe.jpg": ("read", "not_regular_file"),
    "page.jpg": ("decode", "unidentified"),
    "noise.png": ("decode", "unidentified"),
    "lfs.jpg": ("decode", "unidentified"),
    "half.jpg": ("decode", "truncated"),
    "half.png": ("decode", "truncated"),
    "half.webp": ("decode", "truncated"),
    "badsum.png": ("decode", "corrupt"),
    "postscript.jpg": ("decode", "format_not_allowed"),
    "huge.png": ("decode", "too_many_pixels"),
}


def write_broken(folder: Path) -> None:
    """Write one file for each entry of EXPECTED."""
    picture = Image.effect_noise((320, 240), 60).convert("RGB")
    whole = {kind: encode(picture, kind) for kind in ("JPEG", "PNG", "WEBP")}
    content = {
        "empty.jpg": b"",
        "page.jpg": b"<!doctype html><title>404</title>",
        "noise.png": bytes(range(256)) * 4,
        "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
        "half.jpg": whole["JPEG"][: len(whole["JPEG"]) // 2],
        "half.png": whole["PNG"][: len(whole["PNG"]) // 2],
        "half.webp": whole["WEBP"][: len(whole["WEBP"]) // 2],
        "badsum.png": _flip(whole["PNG"], len(whole["PNG"]) // 2),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "huge.png": _png_header(100_000, 100_000),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")


def encode(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data)
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return b"\x89PNG\r\n\x1a\n" + chunks
