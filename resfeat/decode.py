"""Bytes to pixels of the model's size: the pixel policy.

JPEG, PNG, WebP, GIF, BMP and TIFF, recognised by content and not by name. The first frame; EXIF
orientation applied; alpha composited on white; palette and grey to RGB; CMYK as Pillow converts
it; 16-bit grey scaled, not clipped. A truncated file is a failure, never half a picture. A change
to any of this is a change of `spec.PIXEL_POLICY`.

The pixels are those of torchvision's transforms on a Pillow 13 image, to the last bit, and do not
change with the version of Pillow. The exception is a picture more than `LONGEST` times as long as
wide, which is not resized whole: bilinear pixels may move by a level or two, bicubic ones by more,
and nearest ones may be their neighbours.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from resfeat.errors import Failure, Reason
from resfeat.spec import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
MAX_PIXELS = 178_956_970  # Pillow's own limit: twice Image.MAX_IMAGE_PIXELS
LONGEST = 8

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_WHITE = (255, 255, 255, 255)
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

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


def decode(data: bytes, preprocessing: Preprocessing) -> Picture | Failure:
    """The pixels that the model is to see, or why there are none; never raises for bad data."""
    try:
        return _decode(data, preprocessing)
    except _RefusedError as refused:
        return Failure("decode", refused.reason, str(refused))
    except MemoryError:
        return Failure("decode", "out_of_memory", "not enough memory to decode it")
    except Image.DecompressionBombError:
        return Failure("decode", "too_many_pixels", f"more than {MAX_PIXELS:,} pixels")
    # Decoders raise nearly anything for a broken file, so nothing narrower keeps the run alive.
    except Exception as error:
        return Failure("decode", _reason(error), f"{type(error).__name__}: {error}"[:300])


class _RefusedError(Exception):
    """A picture that the pixel policy does not take."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _decode(data: bytes, preprocessing: Preprocessing) -> Picture:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a host program may have set it: no invented pixels
    with _open(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _RefusedError(
                "too_many_pixels", f"{image.width} x {image.height}; {MAX_PIXELS:,} at most"
            )
        image.load()
        tags = getattr(image, "tag_v2", {})  # of a TIFF; a turned copy has none
        rgb = _to_rgb(ImageOps.exif_transpose(image), tags)
    pixels = _resize_and_crop(rgb, preprocessing)
    return Picture(np.asarray(pixels), rgb.width, rgb.height)


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


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    short, crop = preprocessing.resize, preprocessing.crop
    width, height = image.size
    # Both formulas as torchvision has them, roundings included.
    if width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    left, top = (round((side - crop) / 2) for side in resized)
    resample = _FILTERS[preprocessing.interpolation]
    if max(resized) <= LONGEST * short:
        whole = (0.0, 0.0, float(width), float(height))
        resized_image = _resize(image, resized, resample, whole)
        return resized_image.crop((left, top, left + crop, top + crop))
    # A 60,000 x 3 picture would become 4.6 million pixels wide: sample only what the crop keeps.
    across, down = width / resized[0], height / resized[1]
    box = (
        left * across,
        top * down,
        min((left + crop) * across, width),
        min((top + crop) * down, height),
    )
    return _resize(image, (crop, crop), resample, box)


def _resize(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float],
) -> Image.Image:
    """Resample `box` of the image to `size`, one direction after the other.

    Which comes first moves pixels by a level, and Pillow 13 changed it for tall pictures; this is
    its order, fixed.
    """
    left, top, right, bottom = box
    width, height = size
    if image.height > 2 * image.width and image.height > height:
        rows = image.resize((image.width, height), resample, box=(0, top, image.width, bottom))
        return rows.resize(size, resample, box=(left, 0, right, height))
    columns = image.resize((width, image.height), resample, box=(left, 0, right, image.height))
    return columns.resize(size, resample, box=(0, top, width, bottom))


def _reason(error: Exception) -> Reason:
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated"
    return "corrupt"
