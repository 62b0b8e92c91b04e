"""Small pictures of a dataset's images: several are read at a time, in bounded memory."""

from __future__ import annotations

import base64
import ctypes
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from PIL import Image

from resfeat.decoding import PIXEL_BYTES, Loaded, Room, decode, load, quiet
from resfeat.errors import Failure, ResfeatError
from resfeat.runtimes.hardware import memory_bytes
from resfeat.sources import Item
from resfeat.spec import Decode, Preprocessing

SIDE, QUALITY = 96, 70
# Images that are read at once: decoding shares the cores, and a store answers late.
AT_ONCE = 8
# Of their files, and of the machine's memory for their pixels. What is larger is read alone.
FILE_BYTES, SHARE = 256 << 20, 2
# After so many pixels free memory is given back: the C library keeps some for each thread, which is
# as much as all large images together would take.
LARGE = 8_000_000
_PIXELS = Preprocessing(
    resize=SIDE, crop=SIDE, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
)
Drawn = TypeVar("Drawn")


def thumbnails(ids: Iterable[str], items: Mapping[str, Item]) -> dict[str, str | None]:
    """The middle of each image as the address of a JPEG (`data:`), SIDE pixels square. None for one
    that cannot be read any more. items: the images, by id."""
    wanted = list(dict.fromkeys(ids))
    pictures = drawn([items.get(each) for each in wanted], _PIXELS, "turbo", _address)
    return dict(zip(wanted, pictures, strict=True))


def drawn(
    items: Sequence[Item | None],
    pixels: Preprocessing,
    way: Decode,
    finish: Callable[[Image.Image | None], Drawn],
) -> list[Drawn]:
    """What becomes of each image, once it is small: None of one that cannot be read any more. As in
    an extraction, large ones are decoded as there is memory for them."""
    files, room = Room(FILE_BYTES), Room(memory_bytes() // SHARE // PIXEL_BYTES)
    decoder = partial(decode, room=room.of)

    def small(item: Item | None) -> Drawn:
        image: Loaded | Failure | None = None
        if item:
            with suppress(ResfeatError), files.of(item.size or 0):  # a store may be out of reach
                image = load(item, pixels, way, decoder)
                if not isinstance(image, Loaded) or _is_large(image):
                    _give_back()
        pixels_of = image.picture.pixels if isinstance(image, Loaded) else None
        return finish(None if pixels_of is None else Image.fromarray(pixels_of))

    with quiet(), ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(small, items))


def _is_large(image: Loaded) -> bool:
    return image.picture.width * image.picture.height >= LARGE


def _give_back() -> None:
    with suppress(AttributeError, OSError):  # another library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def jpeg(picture: Image.Image, quality: int, *, optimize: bool = False) -> str:
    """The address of a JPEG that is in the page itself."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality, optimize=optimize)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _address(picture: Image.Image | None) -> str | None:
    return jpeg(picture, QUALITY, optimize=True) if picture else None
