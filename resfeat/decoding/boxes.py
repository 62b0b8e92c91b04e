"""The boxes of AVIF and HEIC files: which of both it is, how large, and whether it is cut short.

What libavif and libheif are not careful enough about is found here, before they see the file.
Raises ValueError where there is more than any picture has.
"""

import itertools
import struct
from collections import Counter
from collections.abc import Iterator
from functools import cache
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
# Photographs have some hundreds; a hostile file may have millions.
_MOST_BRANDS, _MOST = 64, 8_000
_DEEPEST = 8  # a picture within a picture within a picture; libheif allows three


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


class _Numbers:
    """Of so many bytes each, one after the other; 0, or none, behind the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def __call__(self, size: int) -> int:
        self.at += size
        return _number(self._data, self.at - size, size)

    def several(self, count: int, size: int) -> tuple[int, ...]:
        """size: 1, 2 or 4."""
        held = self._data[self.at : self.at + count * size]
        self.at += count * size
        whole = len(held) // size
        return struct.unpack(f">{whole}{'-BH-I'[size]}", held[: whole * size])


def kind_of(data: bytes) -> Kind | None:
    """By the first of the file's brands that says so; None for what is neither."""
    if data[4:8] != b"ftyp":
        return None
    size = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MOST_BRANDS)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, size, 4))]  # a version between
    named = next((_KINDS[brand] for brand in brands if brand in _KINDS), None)
    return named or ("HEIC" if _ANY_KIND.intersection(brands) else None)


def largest(data: bytes) -> int:
    """How many pixels have to be decoded at most for one picture of the file: as many as it says it
    has, or as its tiles and layers have. A small file can name one large layer a thousand times."""
    pixels, parts = _pixels_of_items(data), _parts_of_items(data)

    @cache
    def of(item: int, deep: int = 0) -> int:
        if deep > _DEEPEST:
            return 2**63
        named = parts.get(item, Counter())
        inner = sum(times * of(part, deep + 1) for part, times in named.items())
        return max(pixels.get(item, 0), inner)

    return max(map(of, {*pixels, *parts}), default=0)


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
    described = _references(data, b"cdsc")
    total += sum(len(named) * sizes[item] for item, named in described)
    return total


def _pixels_of_items(data: bytes) -> dict[int, int]:
    """By what is declared (ISO/IEC 23008-12, 6.5.3 and 9.3)."""
    pixels: dict[int, int] = {}
    for iprp in _found(data, 0, len(data), b"meta", b"iprp"):
        sizes = [
            _number(data, box.start + 4, 4)
            * _number(data, box.start + 8, 4)
            * (box.kind == b"ispe")
            for ipco in _found(data, iprp.start, iprp.end, b"ipco")
            for box in _boxes(data, ipco.start, ipco.end)
        ]
        for box in _found(data, iprp.start, iprp.end, b"ipma"):
            number = _Numbers(data[box.start : box.end])
            version, flags = number(1), number(3)
            wide = 2 if flags & 1 else 1
            for _ in range(_checked(number(4))):
                item = number(4 if version else 2)
                which = {
                    index & (0x7FFF if wide == 2 else 0x7F)
                    for index in number.several(number(1), wide)
                }
                declared = [sizes[index - 1] for index in which if 0 < index <= len(sizes)]
                pixels[item] = max(pixels.get(item, 0), *declared, 0)
    return pixels


def _parts_of_items(data: bytes) -> dict[int, Counter[int]]:
    """The tiles and layers that a picture is made of, and how often it names each."""
    parts: dict[int, Counter[int]] = {}
    for item, named in _references(data, b"dimg"):
        parts.setdefault(item, Counter()).update(named)
    return parts


def _references(data: bytes, kind: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Which items refer to which others."""
    seen = 0
    for box in _found(data, 0, len(data), b"meta", b"iref"):
        wide = 4 if data[box.start : box.start + 1] == b"\1" else 2
        for each in _found(data, box.start + 4, box.end, kind):
            number = _Numbers(data[each.start : each.end])
            item, count = number(wide), number(2)
            seen = _checked(seen + count)
            yield item, number.several(count, wide)


def _checked(count: int) -> int:
    if count > _MOST:
        raise ValueError(f"more than {_MOST:,} boxes, items or pieces of them")
    return count


def _found(data: bytes, at: int, stop: int, kind: bytes, *inner: bytes) -> Iterator[_Box]:
    """The boxes of a kind between two places, or of the last kind within those of the others."""
    for box in _boxes(data, at, stop):
        if box.kind == kind and inner:
            start = box.start + 4 if kind == b"meta" else box.start  # behind a version and flags
            yield from _found(data, start, min(box.end, stop), *inner)
        elif box.kind == kind:
            yield box._replace(end=min(box.end, stop))


def _boxes(data: bytes, at: int, stop: int) -> Iterator[_Box]:
    for count in itertools.count():
        _checked(count)
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
        yield from _pieces_in(data[box.start : box.end])


def _pieces_in(iloc: bytes) -> Iterator[_Piece]:
    """Those that lie in the file, and not in a box of their own (ISO/IEC 14496-12, 8.11.3)."""
    number = _Numbers(iloc)
    version, _, sizes, more = number(1), number(3), number(1), number(1)
    of_offset, of_size, of_base = sizes >> 4, sizes & 15, more >> 4
    of_index = more & 15 if version else 0
    wide = 4 if version == 2 else 2
    seen = 0
    for _ in range(_checked(number(wide))):
        item = number(wide)
        is_in_file = not (version and number(2) & 15)
        number(2)  # which file: always this one
        base = number(of_base)
        extents = number(2)
        seen = _checked(seen + extents)
        for _ in range(extents):
            number(of_index)
            offset, size = number(of_offset), number(of_size)
            if is_in_file:
                yield _Piece(item, base + offset + size, size)
