"""Bytes to pixels of the model's size: the pixel policy.

JPEG, PNG, WebP, GIF, BMP and TIFF, recognised by content and not by name. The first frame; EXIF
orientation applied; alpha composited on white; palette and grey to RGB; CMYK as Pillow converts
it; 16-bit grey scaled, not clipped. A truncated file is a failure, never half a picture. A change
to any of this is a change of `spec.PIXEL_POLICY`. What would take too long is a failure as well.

There are two ways. "pillow" gives the pixels of torchvision's transforms on a Pillow 13 image, to
the last bit, whatever the version of Pillow. "turbo" is several times faster and differs from it
by a level or two: JPEGs are decoded by libjpeg-turbo, large ones at a half, a quarter or an eighth
of their size but never under twice the size that is wanted, and torch resizes 8-bit pixels. What
either of these does not take, Pillow does.

Both sample only the crop of a picture more than `LONGEST` times as long as wide: bilinear pixels
may move by a level or two, bicubic ones by more, and nearest ones may be their neighbours.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from resfeat.errors import Failure, Reason
from resfeat.spec import Decode, Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
MAX_PIXELS = 178_956_970  # Pillow's own limit: twice Image.MAX_IMAGE_PIXELS
# Of a progressive JPEG, of which each scan, of a few bytes, may go over all pixels. Encoders write
# about ten.
MAX_SCANS = 100
LONGEST = 8
# Of a larger picture, this many pixels are converted at a time: whole copies add up to gigabytes.
BAND = 8_000_000
# libjpeg-turbo can scale while it decodes; what is left is resized properly, from at least this
# many times the size: scaled straight to what is wanted, pixels come out visibly wrong. Of its
# factors these are exact enough (three eighths moves pixels by 30 levels) and the fast ones.
LEAST_SCALED = 2
SCALES = (8, 4, 2)

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_WHITE = (255, 255, 255, 255)
# Of JPEG: any marker but those within a scan, and the two that matter.
_MARKER, _SCAN, _END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]"), b"\xff\xda", b"\xff\xd9"
# Tags of TIFF, and of EXIF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_ORIENTATION = 0x0112
# How to show what EXIF says is stored otherwise: axes swapped first, then rows, columns reversed.
_TURNS: Mapping[Any, tuple[bool, int, int]] = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}

Image.init()  # all signatures are known from here on, in every thread

# Pillow warns of large pictures and odd metadata; here each is either fine or a failure row.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Picture:
    """A decoded image: `pixels` is uint8 [crop, crop, 3] RGB; its size is after orientation."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def decode(data: bytes, preprocessing: Preprocessing, way: Decode) -> Picture | Failure:
    """The pixels that the model is to see, or why there are none; never raises for bad data."""
    try:
        return _decode(data, preprocessing, way)
    except _RefusedError as refused:
        return Failure("decode", refused.reason, str(refused))
    except MemoryError:
        return Failure("decode", "out_of_memory", "not enough memory to decode it")
    except Image.DecompressionBombError:
        return Failure("decode", "too_many_pixels", f"more than {MAX_PIXELS:,} pixels")
    # Decoders raise nearly anything for a broken file, so nothing narrower keeps the run alive.
    except Exception as error:
        return Failure("decode", _reason(error, data), f"{type(error).__name__}: {error}"[:300])


class _RefusedError(Exception):
    """A picture that the pixel policy does not take."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _decode(data: bytes, preprocessing: Preprocessing, way: Decode) -> Picture:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a host program may have set it: no invented pixels
    with _open(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _RefusedError(
                "too_many_pixels", f"{image.width} x {image.height}; {MAX_PIXELS:,} at most"
            )
        if image.info.get("progressive") and (scans := _scans(data)) > MAX_SCANS:
            raise _RefusedError("too_large", f"a JPEG of {scans:,} scans; {MAX_SCANS} at most")
        if way == "turbo" and (picture := _decode_jpeg(data, image, preprocessing)):
            return picture
        image.load()
        tags = getattr(image, "tag_v2", {})  # of a TIFF; a turned copy has none
        ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        if way == "turbo" and _is_resized_by_torch(width, height, preprocessing):
            rgb = _narrowed(image, tags, preprocessing)
            pixels = _resize_with_torch(rgb, width, height, preprocessing)
        else:
            pixels = np.asarray(_resize_and_crop(image, tags, preprocessing))
    return Picture(pixels, width, height)


def _decode_jpeg(data: bytes, image: Image.Image, preprocessing: Preprocessing) -> Picture | None:
    """A plain JPEG by libjpeg-turbo; None for any other, and for one with anything wrong in it,
    which Pillow is to judge."""
    width, height = image.size
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    if not _is_resized_by_torch(width, height, preprocessing):
        return None
    least = LEAST_SCALED * preprocessing.resize
    scale = next((each for each in SCALES if min(width, height) >= each * least), 1)
    try:
        stored = simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // scale), min_width=-(-width // scale)
        )
    except ValueError:  # of what libjpeg only warns of, too
        return None
    swapped, rows, columns = _TURNS.get(image.getexif().get(_ORIENTATION), (False, 1, 1))
    if swapped:
        stored, width, height = stored.swapaxes(0, 1), height, width
    upright = np.ascontiguousarray(stored[::rows, ::columns])
    return Picture(_resize_with_torch(upright, width, height, preprocessing), width, height)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        for name, (_, accept) in Image.OPEN.items():
            # Only the signature is looked at: nothing of a format that is not allowed gets to run.
            if name not in FORMATS and accept and accept(data[:16]) is True:
                message = f"{name}; only JPEG, PNG, WebP, GIF, BMP and TIFF are read"
                raise _RefusedError("format_not_allowed", message) from None
        start = data[:24].decode("ascii", "backslashreplace")
        raise _RefusedError("unidentified", f"not an image: starts with {start!r}") from None


def _scans(data: bytes) -> int:
    """How often a JPEG's data go over the picture, or more, where that is not too often."""
    if (most := data.count(_SCAN)) <= MAX_SCANS:
        return most
    # The same two bytes may stand in what a camera adds: only those of the picture itself count.
    scans, at = 0, 2
    while (marker := _MARKER.search(data, at)) and marker[0] != _END:
        scans += marker[0] == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _bands(
    image: Image.Image, tags: Mapping[int, Any], *, upright: bool = False
) -> Iterator[Image.Image]:
    """The picture as RGB: whole, or, where it is large, cut from top to bottom or left to right."""
    width, height = image.size
    if width * height <= BAND:
        yield _to_rgb(image, tags)
    elif upright:
        step = max(1, BAND // height)
        for left in range(0, width, step):
            yield _to_rgb(image.crop((left, 0, min(left + step, width), height)), tags)
    else:
        step = max(1, BAND // width)
        for top in range(0, height, step):
            yield _to_rgb(image.crop((0, top, width, min(top + step, height))), tags)


def _to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_sixteen_bit(image, tags)).convert("RGB")
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise _RefusedError(
            "format_not_allowed", f"{image.mode} pixels have no fixed way to 8-bit RGB"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit(image: Image.Image, tags: Mapping[int, Any]) -> NDArray[np.uint8]:
    """Grey of up to 16 bits scaled to 8: the full range maps onto the full range."""
    full = 2 ** min(tags.get(_BITS_PER_SAMPLE, (16,))[0], 16) - 1
    wide: NDArray[np.uint16] = np.asarray(image)
    grey: NDArray[np.uint8] = (
        np.rint(wide.astype(np.float32) * (255 / full)).clip(0, 255).astype(np.uint8)
    )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:  # a PNG's one clear value
        grey[wide == image.info["transparency"]] = 255
    return grey


def _resized(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height once the short side is `short`: both as torchvision rounds them."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _corner(resized: tuple[int, int], crop: int) -> tuple[int, int]:
    """Left and top of the centre crop, as torchvision rounds them."""
    left, top = (round((side - crop) / 2) for side in resized)
    return left, top


def _is_resized_by_torch(width: int, height: int, preprocessing: Preprocessing) -> bool:
    short = preprocessing.resize
    usual = max(_resized(width, height, short)) <= LONGEST * short
    return usual and preprocessing.interpolation != "nearest"


def _narrowed(
    image: Image.Image, tags: Mapping[int, Any], preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """RGB pixels [h, w, 3]; of a picture of several bands, as wide as they are to be.

    torch resizes every row by itself before any column, so bands do not move a pixel.
    """
    pixels = map(np.array, _bands(image, tags))
    if image.width * image.height <= BAND:
        return next(pixels)
    across, _ = _resized(image.width, image.height, preprocessing.resize)
    return np.concatenate([_interpolate(each, across, len(each), preprocessing) for each in pixels])


def _resize_with_torch(
    pixels: NDArray[np.uint8], width: int, height: int, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """Pixels [h, w, 3] of a picture of this size, perhaps scaled down already, resized, cropped."""
    crop = preprocessing.crop
    resized = _resized(width, height, preprocessing.resize)
    left, top = _corner(resized, crop)
    return _interpolate(pixels, *resized, preprocessing)[top : top + crop, left : left + crop]


def _interpolate(
    pixels: NDArray[np.uint8], width: int, height: int, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    import torch  # takes seconds, which a child that decodes by Pillow alone need not spend

    with torch.inference_mode():
        shown = torch.nn.functional.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None],  # channels last, and 8 bits throughout
            size=(height, width),
            mode=preprocessing.interpolation,
            antialias=True,
        )
    resized: NDArray[np.uint8] = shown[0].permute(1, 2, 0).numpy()
    return resized


def _resize_and_crop(
    image: Image.Image, tags: Mapping[int, Any], preprocessing: Preprocessing
) -> Image.Image:
    short, crop = preprocessing.resize, preprocessing.crop
    width, height = image.size
    resized = _resized(width, height, short)
    left, top = _corner(resized, crop)
    resample = _FILTERS[preprocessing.interpolation]
    if max(resized) <= LONGEST * short:
        whole = (0.0, 0.0, float(width), float(height))
        resized_image = _resize(image, tags, resized, resample, whole)
        return resized_image.crop((left, top, left + crop, top + crop))
    # A 60,000 x 3 picture would become 4.6 million pixels wide: sample only what the crop keeps.
    across, down = width / resized[0], height / resized[1]
    box = (
        left * across,
        top * down,
        min((left + crop) * across, width),
        min((top + crop) * down, height),
    )
    return _resize(image, tags, (crop, crop), resample, box)


def _resize(
    image: Image.Image,
    tags: Mapping[int, Any],
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float],
) -> Image.Image:
    """Resample `box` of the image, as RGB, to `size`, one direction after the other.

    Which comes first moves pixels by a level, and Pillow 13 changed it for tall pictures; this is
    its order, fixed.
    """
    left, top, right, bottom = box
    width, height = size
    done = 0
    if image.height > 2 * image.width and image.height > height:
        rows = Image.new("RGB", (image.width, height))
        for band in _bands(image, tags, upright=True):
            shrunk = band.resize((band.width, height), resample, box=(0, top, band.width, bottom))
            rows.paste(shrunk, (done, 0))
            done += band.width
        return rows.resize(size, resample, box=(left, 0, right, height))
    columns = Image.new("RGB", (width, image.height))
    for band in _bands(image, tags):
        shrunk = band.resize((width, band.height), resample, box=(left, 0, right, band.height))
        columns.paste(shrunk, (0, done))
        done += band.height
    return columns.resize(size, resample, box=(0, top, width, bottom))


def _reason(error: Exception, data: bytes) -> Reason:
    if "allocate memory" in str(error):  # torch's way to say it
        return "out_of_memory"
    # What libwebp says of a WebP that ends too early is what it says of any broken one.
    is_short = data[:4] == b"RIFF" and 8 + int.from_bytes(data[4:8], "little") > len(data)
    if is_short or isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated"
    return "corrupt"
