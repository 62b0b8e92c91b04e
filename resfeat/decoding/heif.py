"""Open AVIF and HEIC, which lie in the same kind of container.

How to show the picture is what the container says (irot, imir): beside that, the standard has
EXIF's orientation mean nothing. libheif turns the pixels itself and pillow-heif clears EXIF's; of
an AVIF, Pillow gives the container's turn as if EXIF had said it. So either is turned once.

Both libraries take how many threads to use from the globals of a module: these are set while a file
is opened, and then are again what a host program has made them.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from types import ModuleType

from PIL import AvifImagePlugin, Image

from resfeat.decoding.boxes import Kind, is_cut, largest, unpacked
from resfeat.decoding.pillow import MAX_PIXELS, RefusedError, foreign
from resfeat.errors import install

# What a file's items may take in memory beyond its own size. Photographs take far less than this.
_MOST_ADDED = 128 * 1024**2
_setting = Lock()


def open_heif(data: bytes, kind: Kind) -> Image.Image:
    """The primary image, or the first of a sequence, which is decoded when it is loaded."""
    with foreign(data):
        _check(data)
    return _open_avif(data) if kind == "AVIF" else _open_heic(data)


def _check(data: bytes) -> None:
    if is_cut(data):
        raise RefusedError("truncated", "the file ends before its data do")
    if (pixels := largest(data)) > MAX_PIXELS:  # libavif calls such a file broken
        raise RefusedError("too_many_pixels", f"{pixels:,} pixels; {MAX_PIXELS:,} at most")
    if (size := unpacked(data)) > len(data) + _MOST_ADDED:
        raise RefusedError("too_large", f"{len(data):,} bytes that would become {size:,}")


def _open_avif(data: bytes) -> Image.Image:
    if not AvifImagePlugin.SUPPORTED:
        message = "AVIF; this Pillow is built without it, the one of `pip install pillow` has it"
        raise RefusedError("format_not_allowed", message)
    with foreign(data), _set(AvifImagePlugin, DEFAULT_MAX_THREADS=1):
        return AvifImagePlugin.AvifImageFile(io.BytesIO(data))


def _open_heic(data: bytes) -> Image.Image:
    try:
        # Only for those who need it, and never registered: Pillow stays as a host program has it.
        from pillow_heif import options
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        message = f"HEIC; to have it read: {install('heif')}"
        raise RefusedError("format_not_allowed", message) from None
    settings = {"DECODE_THREADS": 0, "DISABLE_SECURITY_LIMITS": False}  # 0: none of its own
    others = dict.fromkeys(("THUMBNAILS", "DEPTH_IMAGES", "AUX_IMAGES"), False)
    with foreign(data), _set(options, **settings, **others):
        image = HeifImageFile(io.BytesIO(data))
    image.info.pop("exif", None)  # what it says of orientation is done, and garbage does no harm
    return image


@contextmanager
def _set(module: ModuleType, **settings: int) -> Iterator[None]:
    with _setting:
        before = {name: getattr(module, name) for name in settings}
        vars(module).update(settings)
        try:
            yield
        finally:
            vars(module).update(before)
