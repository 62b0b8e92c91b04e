"""From an item to pixels: the one way that images take into resfeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from resfeat.decoding.decode import Picture, decode
from resfeat.errors import Failure
from resfeat.spec import Decode, Preprocessing

if TYPE_CHECKING:
    from resfeat.sources import Content, Item

Decoder = Callable[[bytes, Preprocessing, Decode], Picture | Failure]


class Loaded(NamedTuple):
    """A picture, and the size and mtime that its bytes had when they were read."""

    picture: Picture
    size: int
    mtime: int | None


def load(
    item: Item, preprocessing: Preprocessing, way: Decode, decoder: Decoder = decode
) -> Loaded | Failure:
    """Read an image and decode it. Raises ResfeatError where neither the image nor its file is to
    blame."""
    from resfeat.sources import read  # brings Arrow, which a child that only decodes need not load

    return loaded(read(item), preprocessing, way, decoder)


def loaded(
    content: Content | Failure,
    preprocessing: Preprocessing,
    way: Decode,
    decoder: Decoder = decode,
) -> Loaded | Failure:
    """The same of what `sources.read` gave."""
    if isinstance(content, Failure):
        return content
    data, size, mtime = content
    picture = decoder(data, preprocessing, way)
    return picture if isinstance(picture, Failure) else Loaded(picture, size, mtime)
