"""Bytes to pixels of the model's size: the pixel policy.

The first frame; EXIF orientation applied (of AVIF and HEIC, the container's); alpha composited on
white; palette and grey to RGB; CMYK as Pillow converts it; more than 8 bits scaled, not clipped. A
truncated file is a failure, never half a picture. A change to any of this is a change of
`spec.PIXEL_POLICY`; another format, whose files were failures, is not.

"pillow" gives the pixels of torchvision's transforms on a Pillow 13 image, to the last bit. "turbo"
is several times faster and differs by a level or two: libjpeg-turbo decodes JPEGs, large ones
scaled down, and torch resizes 8-bit pixels. What either of these does not take, Pillow does.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from resfeat.decoding.boxes import kind_of
from resfeat.decoding.heif import open_heif
from resfeat.decoding.jpeg import head_of
from resfeat.decoding.pillow import (
    MAX_PIXELS,
    RefusedError,
    Turn,
    foreign,
    stored_of,
    turn_of,
    turned,
)
from resfeat.decoding.resize import narrowed, resize_with_pillow, resize_with_torch, takes_torch
from resfeat.errors import Failure, ResfeatError, first_line
from resfeat.spec import Decode, Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")  # and those of `heif`
_READ = "only JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and HEIC are read"
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")  # bare, and in a container
# Each scan of a progressive JPEG, of a few bytes, may go over all pixels. Encoders write about ten.
MAX_SCANS = 100
# libjpeg-turbo scales while it decodes, by those of its factors that are fast and exact enough, to
# at least this many times the size; scaled straight to the size, pixels come out visibly wrong.
LEAST_SCALED = 2
SCALES = (8, 4, 2)

# Of JPEG: any marker but those within a scan, and the two that matter.
_MARKER, _SCAN, _END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]"), b"\xff\xda", b"\xff\xd9"
# What is entered around the decoding of so many pixels, which takes memory.
RoomFor = Callable[[int], AbstractContextManager[object]]
Image.init()  # all signatures are known from here on, in every thread


@dataclass(frozen=True)
class Picture:
    """A decoded image: `pixels` is uint8 [crop, crop, 3] RGB; its size is after orientation."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings by Pillow of large pictures and odd metadata: each is fine, or a failure row. For
    a whole run, in one thread: Python's warning filters belong to the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        yield


def decode(
    data: bytes, preprocessing: Preprocessing, way: Decode, room: RoomFor = nullcontext
) -> Picture | Failure:
    """The pixels that the model is to see, or why there are none. Raises ResfeatError where our own
    code fails, never for bad data."""
    return _judged(partial(_decode, data, preprocessing, way, room))


def decode_image(
    image: Image.Image, preprocessing: Preprocessing, way: Decode
) -> Picture | Failure:
    """The same of an image that Pillow has opened, which stays as it is: what `decode` gives for a
    PNG of its pixels."""

    def decoded() -> Picture:
        _check_size(image)
        return _by_pillow(b"", image, preprocessing, way)

    return _judged(decoded)


def _judged(decoded: Callable[[], Picture]) -> Picture | Failure:
    """What it gives, or whose fault it is that it gives nothing."""
    try:
        return decoded()
    except RefusedError as refused:
        return Failure("decode", refused.reason, str(refused))
    except MemoryError:
        return Failure("decode", "out_of_memory", "not enough memory to decode it")
    except Exception as error:
        if "allocate memory" in str(error):  # torch's way to say it
            return Failure("decode", "out_of_memory", first_line(error))
        raise ResfeatError(
            f"resfeat itself failed while it resized an image ({type(error).__name__}: "
            f"{first_line(error)}): this is a bug, please report it"
        ) from error


def _decode(data: bytes, preprocessing: Preprocessing, way: Decode, room: RoomFor) -> Picture:
    if way == "turbo" and (picture := _decode_plain(data, preprocessing, room)):
        return picture
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a host program may have set it: no invented pixels
    with foreign(data):
        image = _open(data)
    with image:
        _check_size(image)
        if image.info.get("progressive") and (scans := _scans(data)) > MAX_SCANS:
            raise RefusedError("too_large", f"a JPEG of {scans:,} scans; {MAX_SCANS} at most")
        # Of three colours in an odd file; a plain one did not come as far as this.
        if way == "turbo" and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            with foreign(data):
                turn = turn_of(image)
            with room(image.width * image.height):
                picture = _by_turbo(data, image.size, turn, preprocessing)
            if picture:
                return picture
        with room(image.width * image.height):
            return _by_pillow(data, image, preprocessing, way)


def _check_size(image: Image.Image) -> None:
    if 0 in image.size:
        raise RefusedError("corrupt", f"{image.width} x {image.height} pixels")
    if image.width * image.height > MAX_PIXELS:
        raise RefusedError(
            "too_many_pixels", f"{image.width} x {image.height}; {MAX_PIXELS:,} at most"
        )


def _decode_plain(data: bytes, preprocessing: Preprocessing, room: RoomFor) -> Picture | None:
    """A plain JPEG, without Pillow. None for any other, and for one that may be refused."""
    head = head_of(data)
    if head is None or not 0 < head.width * head.height <= MAX_PIXELS:
        return None
    if head.progressive and data.count(_SCAN) > MAX_SCANS:
        return None
    with room(head.width * head.height):
        return _by_turbo(data, head[:2], head.turn, preprocessing)


def _by_turbo(
    data: bytes, size: tuple[int, int], turn: Turn, preprocessing: Preprocessing
) -> Picture | None:
    """A JPEG by libjpeg-turbo. None for one with anything wrong in it: Pillow is to judge."""
    width, height = size
    if not takes_torch(width, height, preprocessing):
        return None
    least = LEAST_SCALED * preprocessing.resize
    scale = next((each for each in SCALES if min(width, height) >= each * least), 1)
    try:
        stored = simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // scale), min_width=-(-width // scale)
        )
    except ValueError:  # of what libjpeg only warns of, too
        return None
    if turn[0]:
        width, height = height, width
    upright = turned(stored, turn)
    return Picture(resize_with_torch(upright, width, height, preprocessing), width, height)


def _by_pillow(
    data: bytes, image: Image.Image, preprocessing: Preprocessing, way: Decode
) -> Picture:
    with foreign(data):
        stored = stored_of(image)
    width, height = stored.size
    if way == "turbo" and takes_torch(width, height, preprocessing):
        pixels = resize_with_torch(narrowed(stored, preprocessing), width, height, preprocessing)
    else:
        pixels = np.asarray(resize_with_pillow(stored, preprocessing))
    return Picture(pixels, width, height)


def _open(data: bytes) -> Image.Image:
    if kind := kind_of(data):
        return open_heif(data, kind)
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data.startswith(_JPEG_XL):
            raise RefusedError("format_not_allowed", f"JPEG XL; {_READ}") from None
        for name, (_, accept) in Image.OPEN.items():
            # Only the signature is looked at: nothing of a format that is not allowed gets to run.
            if name not in FORMATS and accept and accept(data[:16]) is True:
                raise RefusedError("format_not_allowed", f"{name}; {_READ}") from None
        start = data[:24].decode("ascii", "backslashreplace")
        raise RefusedError("unidentified", f"not an image: starts with {start!r}") from None


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
