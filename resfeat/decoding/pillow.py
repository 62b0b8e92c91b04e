"""What Pillow gives: bands of upright 8-bit RGB, and whose fault it is where it raises."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resfeat.errors import Reason

MAX_PIXELS = 178_956_970  # Pillow's own limit: twice Image.MAX_IMAGE_PIXELS
# A larger picture is converted and turned this many pixels at a time: of the whole there is only
# what Pillow holds. The most that one of `MAX_PIXELS` took is 0.9 GB, but 2.7 GB as a WebP, which
# libwebp copies.
BAND = 8_000_000
_WHITE = (255, 255, 255, 255)
# Tags of TIFF, and of EXIF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_ORIENTATION = 0x0112

# How to show what EXIF says is stored otherwise: axes swapped first, then rows, columns reversed.
Turn = tuple[bool, int, int]
UPRIGHT: Turn = (False, 1, 1)
_TURNS: Mapping[Any, Turn] = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


class RefusedError(Exception):
    """A picture that the pixel policy does not take."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def foreign(data: bytes = b"") -> Iterator[None]:
    """Around the decoders of others: whatever they raise, the file is to blame."""
    try:
        yield
    except (RefusedError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise RefusedError("too_many_pixels", f"more than {MAX_PIXELS:,} pixels") from None
    # Decoders raise nearly anything for a broken file, so nothing narrower keeps the run alive.
    except Exception as error:
        # What libwebp says of a WebP that ends too early is what it says of any broken one.
        is_short = data[:4] == b"RIFF" and 8 + int.from_bytes(data[4:8], "little") > len(data)
        is_short = is_short or isinstance(error, EOFError) or "truncated" in str(error).lower()
        message = f"{type(error).__name__}: {error}"[:300]
        if "compression format has not been built in" in message:  # libheif, of H.264 and others
            raise RefusedError("format_not_allowed", message) from error
        raise RefusedError("truncated" if is_short else "corrupt", message) from error


@dataclass(frozen=True)
class Stored:
    """A picture as Pillow holds it: of any mode, and perhaps turned."""

    image: Image.Image
    turn: Turn
    white: int  # the largest value of 16-bit grey
    inverted: bool  # whether that stands for black

    @property
    def size(self) -> tuple[int, int]:
        """Width and height once it is upright."""
        width, height = self.image.size
        return (height, width) if self.turn[0] else (width, height)

    def bands(self, *, upright: bool = False) -> Iterator[Image.Image]:
        """The upright picture as RGB: whole, or, where it is large, cut from top to bottom or left
        to right."""
        width, height = across, down = self.size
        if width * height > BAND and upright:
            across = max(1, BAND // height)
        elif width * height > BAND:
            down = max(1, BAND // width)
        for top in range(0, height, down):
            for left in range(0, width, across):
                yield self._part(left, top, min(left + across, width), min(top + down, height))

    def _part(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        (width, height), (swapped, rows, columns) = self.size, self.turn
        if rows < 0:
            top, bottom = height - bottom, height - top
        if columns < 0:
            left, right = width - right, width - left
        box = (top, left, bottom, right) if swapped else (left, top, right, bottom)
        part = self.image if box == (0, 0, *self.image.size) else self.image.crop(box)
        rgb = self._rgb(part)
        return rgb if self.turn == UPRIGHT else Image.fromarray(turned(np.asarray(rgb), self.turn))

    def _rgb(self, part: Image.Image) -> Image.Image:
        if part.mode == "RGB" and "transparency" not in part.info:
            return part
        if part.mode.startswith("I;16"):
            return Image.fromarray(self._eight_bit(part)).convert("RGB")
        if part.mode in ("I", "F", "LAB", "HSV"):
            message = f"{part.mode} pixels have no fixed way to 8-bit RGB"
            raise RefusedError("format_not_allowed", message)
        with foreign():
            if part.has_transparency_data:
                part = part.convert("RGBA")
                part = Image.alpha_composite(Image.new("RGBA", part.size, _WHITE), part)
            return part.convert("RGB")

    def _eight_bit(self, part: Image.Image) -> NDArray[np.uint8]:
        """Grey of up to 16 bits scaled to 8: the full range maps onto the full range."""
        wide: NDArray[np.uint16] = np.asarray(part)
        scaled = np.rint(wide.astype(np.float32) * (255 / self.white))
        grey: NDArray[np.uint8] = scaled.clip(0, 255).astype(np.uint8)
        if self.inverted:
            grey = 255 - grey
        if "transparency" in part.info:  # a PNG's one clear value
            grey[wide == part.info["transparency"]] = 255
        return grey


def stored_of(image: Image.Image) -> Stored:
    """Have Pillow decode it, whole. Bands of it are turned and made RGB later, one at a time."""
    image.load()
    if 0 in image.size:
        raise ValueError("no pixels")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = min(tags.get(_BITS_PER_SAMPLE, (16,))[0], 16)
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    return Stored(image, turn_of(image), 2**bits - 1, inverted)


def turn_of(image: Image.Image) -> Turn:
    return turn_for(image.getexif().get(_ORIENTATION))


def turn_for(orientation: Any) -> Turn:
    """For a value of EXIF; those that mean nothing leave the picture as it is."""
    return _TURNS.get(orientation, UPRIGHT)


def turned(pixels: NDArray[np.uint8], turn: Turn) -> NDArray[np.uint8]:
    """Stored pixels [h, w, 3] as they are to be shown."""
    swapped, rows, columns = turn
    upright = pixels.swapaxes(0, 1) if swapped else pixels
    return np.ascontiguousarray(upright[::rows, ::columns])
