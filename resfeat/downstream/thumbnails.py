"""Small pictures of a dataset's images, as text that a page holds within itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from PIL import Image

from resfeat.decoding import Loaded, load, quiet
from resfeat.errors import Failure, ResfeatError
from resfeat.sources import Item
from resfeat.spec import Preprocessing

SIDE, QUALITY = 96, 70
# Images that are read at once: decoding shares the cores, and a store answers late.
AT_ONCE = 8
_PIXELS = Preprocessing(
    resize=SIDE, crop=SIDE, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
)


def thumbnails(ids: Iterable[str], items: Mapping[str, Item]) -> dict[str, str | None]:
    """The middle of each image as the address of a JPEG (`data:`), SIDE pixels square. None for one
    that cannot be read any more. items: the images, by id."""
    wanted = list(dict.fromkeys(ids))
    with quiet(), ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(
            zip(wanted, pool.map(lambda each: _drawn(items.get(each)), wanted), strict=True)
        )


def _drawn(item: Item | None) -> str | None:
    image: Loaded | Failure | None = None
    with suppress(ResfeatError):  # of a store that is out of reach
        image = load(item, _PIXELS, "turbo") if item else None
    if not isinstance(image, Loaded):
        return None
    jpeg = io.BytesIO()
    Image.fromarray(image.picture.pixels).save(jpeg, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
