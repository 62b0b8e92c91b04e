"""The boxes of AVIF and HEIC files: which of both it is, how large, and whether it is cut short.

What libavif and libheif are not careful enough about is found here, before they see the file.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Literal, NamedTuple

Kind = Literal["AVIF", "HEIC"]
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis"), "HEIC"),
    **dict.fromkeys((b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
}
_ANY_KIND = {b"mif1", b"msf1"}  # brands of the container alone, which libheif is to look into
# Boxes without which there is no picture. Behind them there may be anything, whole or not.
_NEEDED = {b"ftyp", b"meta", b"mdat", b"moov"}
# A hostile file may have millions. Files with more than this libheif refuses itself.
_MOST_BRANDS, _MOST_BOXES, _MOST_PIECES = 64, 20_000, 32_000


class _Box(NamedTuple):
    """end: which may lie behind that of the file."""

    kind: bytes
    start: int
    end: int


class _Piece(NamedTuple):
    """Of the data of an item: of a picture, a tile, EXIF."""

    item: int
    end: int
    size: int


def kind_of(data: bytes) -> Kind | None:
    """By the first of the file's brands that says so; None for what is neither."""
    if data[4:8] != b"ftyp":
        return None
    size = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MOST_BRANDS)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, size, 4))]  # a version between
    named = next((_KINDS[brand] for brand in brands if brand in _KINDS), None)
    return named or ("HEIC" if _ANY_KIND.intersection(brands) else None)


def largest(data: bytes) -> tuple[int, int]:
    """Width and height of the largest picture, or tile of one, that is declared."""
    boxes = _found(data, 0, len(data), b"meta", b"iprp", b"ipco", b"ispe")
    sizes = ((_number(data, box.start + 4, 4), _number(data, box.start + 8, 4)) for box in boxes)
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def is_cut(data: bytes) -> bool:
    """Whether a box, or the data of an item, would end behind the end of the file. libheif leaves a
    tile that it has no data for blank, and says nothing."""
    if any(box.end > len(data) and box.kind in _NEEDED for box in _boxes(data, 0, len(data))):
        return True
    return any(piece.end > len(data) for piece in _pieces(data))


def unpacked(data: bytes) -> int:
    """How many bytes the items and properties may take in memory. libheif reads what is the data of
    several items for each of them, and pillow-heif copies what describes several for each."""
    sizes: Counter[int] = Counter()
    for piece in _pieces(data):
        sizes[piece.item] += piece.size
    total = sizes.total()
    for meta in _found(data, 0, len(data), b"meta"):
        total += len(sizes) * (min(meta.end, len(data)) - meta.start)
    for box in _found(data, 0, len(data), b"meta", b"iref"):
        wide = 4 if data[box.start : box.start + 1] == b"\1" else 2
        for each in _found(data, box.start + 4, box.end, b"cdsc"):
            described = _number(data, each.start + wide, 2)
            total += described * sizes[_number(data, each.start, wide)]
    return total


def _found(data: bytes, at: int, stop: int, kind: bytes, *inner: bytes) -> Iterator[_Box]:
    """The boxes of a kind between two places, or of the last kind within those of the others."""
    for box in _boxes(data, at, stop):
        if box.kind == kind and inner:
            start = box.start + 4 if kind == b"meta" else box.start  # behind a version and flags
            yield from _found(data, start, min(box.end, stop), *inner)
        elif box.kind == kind:
            yield box


def _boxes(data: bytes, at: int, stop: int) -> Iterator[_Box]:
    for _ in range(_MOST_BOXES):
        start, size, kind = at + 8, _number(data, at, 4), data[at + 4 : at + 8]
        if size == 1:
            start, size = at + 16, _number(data, at + 8, 8)
        end = at + size if size else stop  # 0: to the end
        if start > min(stop, len(data)) or end < start:
            return
        yield _Box(kind, start, end)
        at = end


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")


def _pieces(data: bytes) -> Iterator[_Piece]:
    for box in _found(data, 0, len(data), b"meta", b"iloc"):
        yield from islice(_pieces_in(data[box.start : box.end]), _MOST_PIECES)


def _pieces_in(iloc: bytes) -> Iterator[_Piece]:
    """Those that lie in the file, and not in a box of their own (ISO/IEC 14496-12, 8.11.3)."""
    at = 0

    def number(size: int) -> int:
        nonlocal at
        at += size
        return _number(iloc, at - size, size)

    version, _, sizes, more = number(1), number(3), number(1), number(1)
    of_offset, of_size, of_base = sizes >> 4, sizes & 15, more >> 4
    of_index = more & 15 if version else 0
    wide = 4 if version == 2 else 2
    for _ in range(number(wide)):
        item = number(wide)
        is_in_file = not (version and number(2) & 15)
        number(2)  # which file: always this one
        base = number(of_base)
        for _ in range(number(2)):
            number(of_index)
            offset, size = number(of_offset), number(of_size)
            if at > len(iloc):
                return
            if is_in_file:
                yield _Piece(item, base + offset + size, size)
