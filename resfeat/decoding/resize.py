"""Resize and centre crop, by Pillow's filters or by torch's.

Only the crop is sampled of a picture more than `LONGEST` times as long as wide: bilinear pixels may
move by a level or two, bicubic ones by more, and nearest ones may be their neighbours.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resfeat.decoding.pillow import Stored
from resfeat.spec import Preprocessing

LONGEST = 8


def _resized(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height once the short side is `short`: both as torchvision rounds them."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _corner(resized: tuple[int, int], crop: int) -> tuple[int, int]:
    """Left and top of the centre crop, as torchvision rounds them."""
    left, top = (round((side - crop) / 2) for side in resized)
    return left, top


def takes_torch(width: int, height: int, preprocessing: Preprocessing) -> bool:
    short = preprocessing.resize
    usual = max(_resized(width, height, short)) <= LONGEST * short
    return usual and preprocessing.interpolation != "nearest"


def narrowed(stored: Stored, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """RGB pixels [h, w, 3]; of a picture of several bands, as wide as they are to be. torch resizes
    every row by itself before any column, so bands do not move a pixel."""
    width, height = stored.size
    across, _ = _resized(width, height, preprocessing.resize)
    bands = [
        band if len(band) == height else _interpolate(band, across, len(band), preprocessing)
        for band in map(np.array, stored.bands())
    ]
    return bands[0] if len(bands) == 1 else np.concatenate(bands)


def resize_with_torch(
    pixels: NDArray[np.uint8], width: int, height: int, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """Pixels [h, w, 3] of a picture of this size, perhaps scaled down already, resized, cropped."""
    crop, resized = preprocessing.crop, _resized(width, height, preprocessing.resize)
    left, top = _corner(resized, crop)
    return _interpolate(pixels, *resized, preprocessing)[top : top + crop, left : left + crop]


def _interpolate(
    pixels: NDArray[np.uint8], width: int, height: int, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    import torch  # takes seconds, which a child that decodes by Pillow alone need not spend

    # What `torch.nn.functional.interpolate` calls with antialias=True, after checks that hold
    # Python's lock for 10 us.
    kernel = getattr(torch._C._nn, f"_upsample_{preprocessing.interpolation}2d_aa")
    # Of 8 bits, and channels last. torch sees the latter by the strides alone, also by that of the
    # one picture: as `pixels[None]` has it, it would take the colours apart and resize each.
    stored = torch.from_numpy(pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2))
    shown = kernel(stored, (height, width), False, None)
    resized: NDArray[np.uint8] = shown.numpy()[0].transpose(1, 2, 0)
    return resized


def resize_with_pillow(stored: Stored, preprocessing: Preprocessing) -> Image.Image:
    short, crop = preprocessing.resize, preprocessing.crop
    width, height = stored.size
    resized = _resized(width, height, short)
    left, top = _corner(resized, crop)
    right, bottom = left + crop, top + crop
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    if max(resized) <= LONGEST * short:
        whole = _resize(stored, resized, resample, (0, 0, width, height))
        return whole.crop((left, top, right, bottom))
    # A 60,000 x 3 picture would become 4.6 million pixels wide: sample only what the crop keeps.
    across, down = width / resized[0], height / resized[1]
    box = (left * across, top * down, min(right * across, width), min(bottom * down, height))
    return _resize(stored, (crop, crop), resample, box)


def _resize(
    stored: Stored,
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float],
) -> Image.Image:
    """Resample `box` of the picture, as RGB, to `size`, one direction after the other.

    Which comes first moves pixels by a level, and Pillow 13 changed it for tall pictures; this is
    its order, fixed.
    """
    left, top, right, bottom = box
    width, height = size
    full_width, full_height = stored.size
    done = 0
    if full_height > 2 * full_width and full_height > height:
        rows = Image.new("RGB", (full_width, height))
        for band in stored.bands(upright=True):
            shrunk = band.resize((band.width, height), resample, box=(0, top, band.width, bottom))
            rows.paste(shrunk, (done, 0))
            done += band.width
        return rows.resize(size, resample, box=(left, 0, right, height))
    columns = Image.new("RGB", (width, full_height))
    for band in stored.bands():
        shrunk = band.resize((width, band.height), resample, box=(left, 0, right, band.height))
        columns.paste(shrunk, (0, done))
        done += band.height
    return columns.resize(size, resample, box=(0, top, width, bottom))
