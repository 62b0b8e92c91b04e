"""Golden pixels: what the pixel policy gives today, to the last bit.

Vectors belong together only if their pixels came about in the same way. So when a pixel moves, be
it through Pillow or through us, either undo that, or bump `spec.PIXEL_POLICY` and write the file
anew with `python tests/test_golden.py`.

The pictures are made here and stored without loss. JPEG decoders may differ by a level or two from
version to version, so JPEG has a test of its own, with a tolerance. Pillow writes AVIF with a loss
and of 8 bits only, so `golden/` has `pattern` as the encoder of libaom stores it without a loss.
"""

import io
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import pytest
from containers import LOSSLESS, avif, deep_heic, heic
from numpy.typing import NDArray
from PIL import Image

from resfeat.decoding import Picture, decode
from resfeat.decoding.resize import LONGEST
from resfeat.spec import PIXEL_POLICY, Preprocessing

GOLDEN = Path(__file__).parent / "golden" / "pixels.json"
RESIZE, CROP = 8, 6  # small enough for the file to hold the pixels themselves
ADVICE = (
    "Either undo what moved the pixels, or bump spec.PIXEL_POLICY and write the golden file anew "
    "with `python tests/test_golden.py`."
)
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG


@dataclass(frozen=True)
class Case:
    """A file, and the plain 8-bit RGB that it stands for, worked out here and not by Pillow."""

    data: bytes
    shown: NDArray[np.uint8]
    within: int = 0  # levels by which the arithmetic may round otherwise
    interpolation: str = "bilinear"


def pattern(width=24, height=18, channels=3):
    """Ramps with some texture: no two turns of it and no two of its channels are alike."""
    y, x, c = np.mgrid[:height, :width, :channels]
    ramps = x * (160 - 50 * c) // width + y * 40 * c // height
    return (30 + 10 * c + ramps + x * y * (c + 3) % 56).astype(np.uint8)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows, colour, *chunks, depth=8):
    """A PNG by hand: some kinds Pillow cannot write, and its faults should not cancel out."""
    size = rows.shape[1] * max(8 // depth, 1), len(rows)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)),
            *(chunk(kind, bytes(body)) for kind, body in chunks),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
            chunk(b"IEND", b""),
        ]
    )


def saved(kind, mode, *frames, palette=None, **options):
    pictures = [Image.frombytes(mode, (f.shape[1], f.shape[0]), f.tobytes()) for f in frames]
    if palette is not None:
        for picture in pictures:
            picture.putpalette(palette.tobytes())
    if len(pictures) > 1:
        options |= {"save_all": True, "append_images": pictures[1:]}
    buffer = io.BytesIO()
    pictures[0].save(buffer, kind, **options)
    return buffer.getvalue()


def grey_as_rgb(grey):
    return np.repeat(grey.reshape(*grey.shape[:2], 1), 3, axis=2)


def on_white(rgb, alpha):
    return np.rint(255 - (255.0 - rgb) * (alpha / 255)).astype(np.uint8)


# How the upright picture lies in the file: EXIF says where the stored first row and column belong.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}


def orientation(number):
    """EXIF with this orientation and nothing else."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x112, 3, 1, number, 0, 0)


def made_cases():
    rgb = pattern()
    grey, alpha = rgb[..., :1], pattern(channels=4)[::-1, :, 3:]
    index = grey[..., 0] // 32
    palette = pattern(8, 1)[0]
    clear = (index == 3)[..., None] * np.uint8(255)  # where the transparent colour is
    clear_shown = on_white(palette[index], 255 - clear)
    alphas = np.array([255, 0, 40, 80, 120, 160, 200, 240], np.uint8)
    bits = grey[..., 0] > 100
    cmyk = pattern(channels=4)
    paper, ink = 255.0 - cmyk[..., :3], 255.0 - cmyk[..., 3:]
    # Low bytes with which scaling gives one level more or less than the high byte alone.
    wide = rgb.astype(np.uint16) * 256 + np.where(rgb < 128, 255, 0).astype(np.uint16)
    wide_grey = wide[..., 0]
    wide_grey_shown = grey_as_rgb(np.rint(wide_grey / 257).astype(np.uint8))

    yield "png-rgb", Case(png(rgb, RGB), rgb)
    yield "bmp-rgb", Case(saved("BMP", "RGB", rgb), rgb)
    yield "tiff-rgb", Case(saved("TIFF", "RGB", rgb), rgb)
    yield "webp-rgb", Case(saved("WEBP", "RGB", rgb, lossless=True), rgb)

    for number, store in STORED.items():
        exif = b"eXIf", orientation(number)
        yield f"png-exif-{number}", Case(png(store(rgb), RGB, exif), rgb)

    yield "png-grey", Case(png(grey, GREY), grey_as_rgb(grey))
    packed = np.packbits(bits, axis=1)
    yield "png-1-bit", Case(png(packed, GREY, depth=1), grey_as_rgb(bits * np.uint8(255)))
    yield "png-palette", Case(png(index, PALETTE, (b"PLTE", palette)), palette[index])
    yield "gif-palette", Case(saved("GIF", "P", index, palette=palette), palette[index])
    inks = (255 - paper * ink / 255).astype(np.uint8)
    yield "tiff-cmyk", Case(saved("TIFF", "CMYK", cmyk), 255 - inks, within=1)

    grey_alpha = np.dstack([grey, alpha])
    shown = grey_as_rgb(on_white(grey, alpha))
    yield "png-grey-alpha", Case(png(grey_alpha, GREY_ALPHA), shown, within=1)
    rgba = np.dstack([rgb, alpha])
    yield "png-rgba", Case(png(rgba, RGBA), on_white(rgb, alpha), within=1)
    data = saved("WEBP", "RGBA", rgba, lossless=True, exact=True)
    yield "webp-rgba", Case(data, on_white(rgb, alpha), within=1)
    data = png(index, PALETTE, (b"PLTE", palette), (b"tRNS", alphas))
    shown = on_white(palette[index], alphas[index][..., None])
    yield "png-palette-alpha", Case(data, shown, within=1)
    data = saved("GIF", "P", index, palette=palette, transparency=3)
    yield "gif-palette-transparent", Case(data, clear_shown)
    data = png(index * np.uint8(30), GREY, (b"tRNS", struct.pack(">H", 3 * 30)))
    shown = grey_as_rgb(on_white(index[..., None] * 30, 255 - clear))
    yield "png-grey-transparent", Case(data, shown)
    data = png(palette[index], RGB, (b"tRNS", palette[3].astype(">u2")))
    yield "png-rgb-transparent", Case(data, clear_shown)

    data = png(wide_grey.astype(">u2"), GREY, depth=16)
    yield "png-grey-16-bit", Case(data, wide_grey_shown)
    for end, order, mode in ("little", "<u2", "I;16"), ("big", ">u2", "I;16B"):
        data = saved("TIFF", mode, wide_grey.astype(order))
        yield f"tiff-grey-16-bit-{end}-endian", Case(data, wide_grey_shown)
    # Of colours Pillow keeps the high byte.
    shown = np.rint(wide / 257).astype(np.uint8)
    yield "png-rgb-16-bit", Case(png(wide.astype(">u2"), RGB, depth=16), shown, within=1)

    yield from heif_cases(rgb, alpha)

    # Were another frame taken, it would be the negative.
    data = saved("GIF", "P", index, 7 - index, palette=palette)
    yield "gif-animation", Case(data, palette[index])
    yield "webp-animation", Case(saved("WEBP", "RGB", rgb, 255 - rgb, lossless=True), rgb)
    yield "png-animation", Case(saved("PNG", "RGB", rgb, 255 - rgb), rgb)

    # 24 x 21 and 24 x 94: what is cut off is odd, so the half pixel goes left or right. And Pillow
    # 13 shrinks what is more than twice as tall as wide in another order of passes than 12 did.
    for width, height in (1, 1), (24, 21), (24, 94), (4000, 3), (3, 4000):
        shape = pattern(width, height)
        yield f"png-{width}x{height}", Case(png(shape, RGB), shape)
    odd = pattern(223, 225)
    for interpolation in "bilinear", "bicubic", "nearest":
        case = Case(png(odd, RGB), odd, interpolation=interpolation)
        yield f"png-223x225-{interpolation}", case


def heif_cases(rgb, alpha):
    for name in "rgb", "rgb-10-bit", "rgb-12-bit":
        data = (GOLDEN.parent / f"{name}.avif").read_bytes()
        yield f"avif-{name}", Case(data, rgb)
    data = (GOLDEN.parent / "grey-10-bit.avif").read_bytes()
    yield "avif-grey-10-bit", Case(data, grey_as_rgb(rgb[..., :1]))
    data = (GOLDEN.parent / "rgba.avif").read_bytes()
    yield "avif-rgba", Case(data, on_white(rgb, alpha), within=1)

    for number, store in STORED.items():
        picture, exif = Image.fromarray(store(rgb)), b"Exif\0\0" + orientation(number)
        yield f"heic-exif-{number}", Case(heic(picture, exif=exif, **LOSSLESS), rgb)
    tiled = pattern(150, 100)
    data = heic(Image.fromarray(tiled), tile_size=64, **LOSSLESS)
    yield "heic-of-tiles", Case(data, tiled)
    data = heic(Image.fromarray(rgb[..., 0]), **LOSSLESS)
    yield "heic-grey", Case(data, grey_as_rgb(rgb[..., :1]))
    data = heic(Image.fromarray(np.dstack([rgb, alpha])), **LOSSLESS)
    yield "heic-rgba", Case(data, on_white(rgb, alpha), within=1)
    size, wide = (rgb.shape[1], rgb.shape[0]), rgb.astype("<u2") * 257
    for bits in 10, 12:
        data = deep_heic("RGB;16", size, wide.tobytes(), bits)
        yield f"heic-rgb-{bits}-bit", Case(data, rgb)
    data = deep_heic("I;16", size, wide[..., 0].tobytes(), 10)
    yield "heic-grey-10-bit", Case(data, grey_as_rgb(rgb[..., :1]))


CASES = dict(made_cases())


def decoded(data, interpolation="bilinear", way="pillow") -> Picture:
    preprocessing = Preprocessing(
        resize=RESIZE,
        crop=CROP,
        interpolation=interpolation,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    result = decode(data, preprocessing, way)
    assert isinstance(result, Picture), result
    return result


def levels_apart(pixels, others):
    return int(np.abs(pixels.astype(int) - others).max())


def as_golden(case):
    """A case's line in the golden file: its pixels row by row, six hex digits a pixel, for each
    way of decoding."""
    line = {}
    for way in "pillow", "turbo":
        picture = decoded(case.data, case.interpolation, way)
        line |= {"width": picture.width, "height": picture.height}
        line[way] = " ".join(row.tobytes().hex() for row in picture.pixels)
    return line


def write_golden():
    lines = ",\n".join(f'    "{name}": {json.dumps(as_golden(CASES[name]))}' for name in CASES)
    head = f'  "pixel_policy": "{PIXEL_POLICY}",\n  "pillow": "{PIL.__version__}",\n'
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(f'{{\n{head}  "cases": {{\n{lines}\n  }}\n}}\n')


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_the_golden_file_is_of_this_policy_and_has_these_cases(golden):
    assert golden["pixel_policy"] == PIXEL_POLICY, ADVICE
    assert list(golden["cases"]) == list(CASES), ADVICE


@pytest.mark.parametrize("name", CASES)
def test_no_pixel_has_moved(golden, name):
    pillows = f"The file is of Pillow {golden['pillow']}, and this is {PIL.__version__}. "
    assert as_golden(CASES[name]) == golden["cases"].get(name), pillows + ADVICE


@pytest.mark.parametrize("name", [name for name in CASES if "animation" in name])
def test_the_animations_do_move(name):
    with Image.open(io.BytesIO(CASES[name].data)) as image:
        assert image.n_frames == 2


@pytest.mark.parametrize("way", ["pillow", "turbo"])
@pytest.mark.parametrize("name", CASES)
def test_the_pixels_are_those_of_the_picture_that_the_file_stands_for(name, way):
    """Resized whole, then cropped; of very long ones only the crop is sampled, nearly the same."""
    case = CASES[name]
    height, width = case.shown.shape[:2]
    short = min(width, height)
    size = int(RESIZE * width / short), int(RESIZE * height / short)
    left, top = (round((side - CROP) / 2) for side in size)
    resample = Image.Resampling[case.interpolation.upper()]
    whole = np.asarray(Image.fromarray(case.shown).resize(size, resample))
    expected = whole[top : top + CROP, left : left + CROP]
    picture = decoded(case.data, case.interpolation, way)
    assert (picture.width, picture.height) == (width, height)
    very_long = max(size) > LONGEST * RESIZE
    other_order = height > 2 * width  # of the two directions, in a Pillow before 13
    within = case.within + 2 * very_long + other_order + 2 * (way == "turbo")
    assert levels_apart(picture.pixels, expected) <= within
    assert expected.std() > 5  # else a blank would pass


@pytest.mark.parametrize("way", ["pillow", "turbo"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("turn", [1, 6])
def test_a_jpeg_gives_nearly_the_pixels_of_the_same_picture_without_loss(mode, turn, way):
    upright = pattern(channels=len(Image.new(mode, (1, 1)).getbands()))
    exif = b"Exif\0\0" + orientation(turn)
    jpeg = saved("JPEG", mode, STORED[turn](upright), quality=95, subsampling=0, exif=exif)
    picture, exact = decoded(jpeg, way=way), decoded(saved("TIFF", mode, upright))
    assert (picture.width, picture.height) == (exact.width, exact.height)
    assert levels_apart(picture.pixels, exact.pixels) <= 4


@pytest.mark.parametrize("way", ["pillow", "turbo"])
@pytest.mark.parametrize("turn", STORED)
def test_an_avif_is_turned_once(turn, way):
    exif = b"Exif\0\0" + orientation(turn)
    picture = Image.fromarray(STORED[turn](pattern()))
    data = avif(picture, quality=100, subsampling="4:4:4", exif=exif)
    shown, exact = decoded(data, way=way), decoded(saved("TIFF", "RGB", pattern()))
    assert (shown.width, shown.height) == (exact.width, exact.height)
    assert levels_apart(shown.pixels, exact.pixels) <= 4


if __name__ == "__main__":
    write_golden()
