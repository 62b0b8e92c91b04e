"""A folder of everything that may lie in a folder of images, made here, with what must come of it.

`write_hostile` gives, for each id that a listing must have, the outcomes that are right: a reason
of the closed list, or None for an embedding. Where there are several, decoders are free to differ,
but not from one run to the next.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from containers import avif, declaring, heic, of_layers, with_notes
from PIL import Image

Outcomes = frozenset[str | None]
Case = tuple[str, bytes, Outcomes]  # file name, content, what may come of it

EMBEDDED: Outcomes = frozenset({None})
UNIDENTIFIED: Outcomes = frozenset({"unidentified"})
TRUNCATED: Outcomes = frozenset({"truncated"})
CORRUPT: Outcomes = frozenset({"corrupt"})
TOO_MANY: Outcomes = frozenset({"too_many_pixels"})
TOO_LARGE: Outcomes = frozenset({"too_large"})
REFUSED: Outcomes = frozenset({"format_not_allowed"})
NO_FILE: Outcomes = frozenset({"not_regular_file"})
NOT_FOUND: Outcomes = frozenset({"not_found"})
DAMAGED = EMBEDDED | UNIDENTIFIED | TRUNCATED | CORRUPT | TOO_MANY | REFUSED

GREY, RGB = 0, 2  # colour types of PNG

ODD_NAMES = (
    *("[a]*?.jpg", "-rf", "_temporary", "CON.JPG", "a\\b.jpg", "%2e%2e%2fx.jpg", "s3:__bucket.jpg"),
    *(" lead and trail .jpg ", "a#b?c=d&e.jpg", "comma,quote'\"\t.jpg", "new\nline.jpg"),
    *("bell\x07.jpg", "\x1b[31mred\x1b]0;title\x07.jpg", "right\u202eto left.jpg"),
    *("composed \u00e9.jpg", "composed e\u0301.jpg", "x" * 251 + ".jpg"),
)


def write_hostile(folder: Path) -> dict[str, Outcomes]:
    """Fill the folder; the outcomes that are right for each id of its listing, and no other ids."""
    expected: dict[str, Outcomes] = {}
    for name, data, outcomes in (*_pictures(), *_damaged(), *_bombs(), *_impostors()):
        (folder / name).write_bytes(data)
        expected[name] = outcomes
    plain = _encode("JPEG")
    for name in ODD_NAMES:
        (folder / name).write_bytes(plain)
        expected[name] = EMBEDDED
    # Bytes that are no UTF-8 are escaped, and so a name that looks escaped already is, too.
    (folder / os.fsdecode(b"latin \xe9.jpg")).write_bytes(plain)
    (folder / r"latin \xe9.jpg").write_bytes(plain)
    expected |= {r"latin \xe9.jpg": EMBEDDED, r"latin \\xe9.jpg": EMBEDDED}
    return expected | _write_nodes(folder, plain)


def _write_nodes(folder: Path, plain: bytes) -> dict[str, Outcomes]:
    """What is no plain file; and what is not to be listed, so that it has no outcome."""
    os.mkfifo(folder / "pipe.jpg")
    os.mknod(folder / "socket.jpg", stat.S_IFSOCK | 0o600)
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "link.jpg").symlink_to("[a]*?.jpg")
    (folder / "sparse.jpg").touch()
    os.truncate(folder / "sparse.jpg", 64 * 1024**3)
    (folder / "secret.jpg").write_bytes(plain)
    (folder / "secret.jpg").chmod(0)
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "within").write_bytes(plain)
    (folder / "folder.jpg" / "up").symlink_to("..")
    (folder / "loop").symlink_to(".")
    (folder / ".hidden.jpg").write_bytes(plain)
    return {
        "pipe.jpg": NO_FILE,
        "socket.jpg": NO_FILE,
        "dangling.jpg": NOT_FOUND,
        "self.jpg": NOT_FOUND,
        "link.jpg": EMBEDDED,
        "sparse.jpg": TOO_LARGE,
        "secret.jpg": frozenset({"permission"}) if os.geteuid() else EMBEDDED,  # root reads all
        "folder.jpg/within": EMBEDDED,
    }


def _pictures() -> Iterator[Case]:
    """Odd, but whole: each of these is somebody's photograph."""
    picture = _picture()
    jpeg, png = _encode("JPEG"), _encode("PNG")
    grey16 = Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13)
    frames: dict[str, Any] = {
        "save_all": True,
        "append_images": [picture.rotate(90 * n) for n in (1, 2, 3)],
    }
    odd = {
        "png.jpg": png,
        "jpeg.png": jpeg,
        "webp.gif": _encode("WEBP"),
        "tiff.txt.bmp": _encode("TIFF"),
        "no extension": jpeg,
        "UPPER.JPEG": jpeg,
        "junk behind.jpg": jpeg + bytes(100_000),
        "archive behind.jpg": jpeg + b"PK\x05\x06" + bytes(18),
        "markup behind.png": png + b"<script>alert(1)</script>",
        "cmyk.jpg": _encode("JPEG", picture.convert("CMYK")),
        "grey16.png": _encode("PNG", grey16),
        "grey16.tif": _encode("TIFF", grey16),
        "palette.png": _encode("PNG", picture.convert("P"), transparency=bytes(range(256))),
        "alpha.webp": _encode("WEBP", picture.convert("RGBA")),
        "one bit.png": _encode("PNG", picture.convert("1")),
        "animated.gif": _encode("GIF", **frames),
        "animated.webp": _encode("WEBP", **frames),
        "animated.png": _encode("PNG", **frames),
        "pages.tif": _encode("TIFF", **frames),
        "dot.png": _encode("PNG", Image.new("RGB", (1, 1))),
        "wide.png": _flat_png(60_000, 3),
        "tall.png": _flat_png(3, 60_000),
        "tall.jpg": _encode("JPEG", Image.new("RGB", (3, 60_000))),
        "exif garbage.jpg": _encode("JPEG", exif=b"Exif\0\0" + b"?" * 60_000),
        "exif loop.jpg": _encode("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"),
        "exif empty.jpg": _encode("JPEG", exif=b"Exif\0\0"),
        "large.png": _flat_png(7000, 7000),
        "large grey.png": _flat_png(9000, 9000, GREY),
        "avif.jpg": avif(picture),
        "heic.jpg": heic(picture),
        "animated.avif": _encode("AVIF", **frames),
        "of several.heic": heic(picture, picture.rotate(90)),
        "tiles.heic": heic(picture, tile_size=64),
        "film behind.heic": heic(picture) + b"\0\1\0\0mpvd" + bytes(100),
        "text behind.avif": avif(picture) + b"just some words\n" * 20,
        "exif garbage.heic": heic(picture, exif=b"Exif\0\0" + b"?" * 60_000),
        "notes.heic": with_notes(heic(picture), 20, 1000),
        "depth.heic": _with_depth(),
        "layers.heic": of_layers(heic(picture), 3, *picture.size),
    }
    for name, data in odd.items():
        yield name, data, EMBEDDED
    for turn in range(10):  # 1 to 8 mean something
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"exif {turn}.jpg", _encode("JPEG", exif=exif), EMBEDDED


def _damaged() -> Iterator[Case]:
    """Cut off at many points, and bits flipped: a disk, a download or a copy that went wrong."""
    chance = np.random.default_rng(0)
    made = {
        **{kind: _encode(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")},
        "progressive": _encode("JPEG", progressive=True),
        "HEIC": heic(_picture()),
        "tiles.HEIC": heic(_picture(), tile_size=64),
    }
    for kind, whole in made.items():
        yield f"cut 3 bytes.{kind}", whole[:3], TRUNCATED | UNIDENTIFIED
        for percent in (1, 10, 30, 50, 70, 90, 99):
            outcomes = TRUNCATED | UNIDENTIFIED if percent == 1 else TRUNCATED
            yield f"cut {percent:02}.{kind}", whole[: len(whole) * percent // 100], outcomes
        for flips in (1, 4, 16, 64, 256):
            flipped = bytearray(whole)
            for place in chance.integers(0, len(whole), flips):
                flipped[place] ^= 1 << int(chance.integers(8))
            yield f"flipped {flips}.{kind}", bytes(flipped), DAMAGED


def _bombs() -> Iterator[Case]:
    """A few bytes that ask for a lot of memory, or of time."""
    claim = _png(100_000, 100_000, RGB, b"")
    yield "bomb.png", claim, TOO_MANY
    yield "bomb 2**31.png", _png(2**31 - 1, 2**31 - 1, RGB, b""), TOO_MANY
    yield "bomb with a wrong sum.png", claim[:29] + bytes(4) + claim[33:], UNIDENTIFIED | CORRUPT
    frame = b"," + struct.pack("<HHHHBB", 0, 0, 65_535, 65_535, 0, 8) + b"\0;"
    yield "bomb.gif", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + frame, TOO_MANY
    yield "just too many.png", _flat_png(13_378, 13_378, GREY), TOO_MANY
    text = zlib.compress(bytes(50_000_000))
    yield "text bomb.png", _png(8, 8, GREY, bytes(72), (b"zTXt", b"k\0\0" + text)), CORRUPT
    yield "texts.png", _png(8, 8, GREY, bytes(72), *[(b"tEXt", b"k\0v")] * 20_000), EMBEDDED
    large = _encode("JPEG", Image.new("RGB", (4000, 3000)), progressive=True)
    scan = large[large.rindex(b"\xff\xda") : -2]
    yield "scans.jpg", large[:-2] + scan * 2_000 + large[-2:], TOO_LARGE
    # A film after the photograph, as phones write it, has the same bytes by chance.
    film = b"\xff\xda" * 200
    yield "film.jpg", _encode("JPEG", progressive=True) + film, EMBEDDED
    exif = b"Exif\0\0" + film
    yield "thumbnail.jpg", _encode("JPEG", progressive=True, exif=exif), EMBEDDED
    yield from _heif_bombs()


def _heif_bombs() -> Iterator[Case]:
    for kind, whole in ("avif", avif(_picture())), ("heic", heic(_picture(), tile_size=64)):
        for side in 13_378, 16_385, 2**31 - 1:
            yield f"bomb {side}.{kind}", declaring(whole, side, side), TOO_MANY
        yield f"no side.{kind}", declaring(whole, 0, 0), CORRUPT
    # 4 MB that would be read 900 times.
    yield "notes bomb.heic", with_notes(heic(_picture()), 900, 4_000_000), TOO_LARGE
    layer = declaring(heic(_picture()), 8_000, 8_000)
    yield "layers bomb.heic", of_layers(layer, 900, 8_000, 8_000), TOO_MANY
    tiles = heic(_picture(), tile_size=64)
    yield "no data.heic", tiles[: tiles.index(b"mdat") - 4], TRUNCATED
    yield "notes alone.heic", heic(_picture()).replace(b"hvc1", b"Exif"), CORRUPT


def _with_depth() -> bytes:
    """With how far away things are beside the picture, which is stored as what is clear is."""
    picture = _picture()
    picture.putalpha(picture.convert("L"))
    return heic(picture).replace(b"auxid:1", b"auxid:2")


def _impostors() -> Iterator[Case]:
    """No images, whatever they are called; nothing in them is followed or run."""
    yield "empty.jpg", b"", frozenset({"empty"})
    yield "zeros.jpg", bytes(5000), UNIDENTIFIED
    yield "byte.jpg", b"\xff", UNIDENTIFIED
    yield "text.jpg", b"just some words\n" * 20, UNIDENTIFIED
    yield "page.jpg", b"<!DOCTYPE html><html><h1>403 Forbidden</h1></html>", UNIDENTIFIED
    yield "vector.png", b'<svg xmlns="http://www.w3.org/2000/svg"><a href="/"/></svg>', UNIDENTIFIED
    yield "program.jpg", b"\x7fELF" + bytes(60), UNIDENTIFIED
    yield "document.jpg", b"%PDF-1.7\n1 0 obj <<>> endobj\n%%EOF\n", UNIDENTIFIED
    yield "script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", REFUSED
    yield "bare.jxl", b"\xff\x0a\xfa\x1f" + bytes(50), REFUSED
    yield "boxed.jxl", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl " + bytes(50), REFUSED
    yield "av1.heic", avif(_picture()).replace(b"avif", b"heic"), REFUSED
    yield "film.heic", b"\0\0\0\x14ftypisom\0\0\0\0isom" + bytes(50), UNIDENTIFIED
    yield "floats.tif", _encode("TIFF", Image.new("F", (9, 9))), REFUSED


def _picture() -> Image.Image:
    """Ramps and noise: every kind of damage shows, and no kind compresses it to nothing."""
    noise = np.random.default_rng(1).integers(0, 40, (120, 160, 3))
    y, x, c = np.mgrid[:120, :160, :3]
    return Image.fromarray((y + x // 2 + 8 * c + noise).astype(np.uint8))


def _encode(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or _picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def _flat_png(width: int, height: int, colour: int = RGB) -> bytes:
    """A whole picture of zeros, which is a file a thousand times smaller."""
    row = bytes(1 + width * (3 if colour == RGB else 1))
    return _png(width, height, colour, row * height)


def _png(width: int, height: int, colour: int, rows: bytes, *before: tuple[bytes, bytes]) -> bytes:
    """An 8-bit PNG by hand, with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), *before, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
