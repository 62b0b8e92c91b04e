"""The headers of a tar, one after the other, past those that are damaged."""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from tarfile import TarInfo
from typing import IO, NamedTuple, cast

from resfeat.sources.windowed import DAMAGED, Unzipped, Windowed

BLOCK = tarfile.BLOCKSIZE
# Blocks that are looked at together for the next header.
TOGETHER = 128
# As in the headers of every kind of tar that is written today.
_MAGIC, _MAGIC_PLACE = b"ustar", slice(257, 262)
_CODE, _ERRORS = "utf-8", "surrogateescape"
# What `tarfile` raises where a header says what no header should.
_UNREADABLE = (ValueError, OverflowError, LookupError, RecursionError, *DAMAGED)

File = Windowed | Unzipped


class Damage(NamedTuple):
    """A place, in bytes, where a tar has no header, and should have one."""

    place: int
    message: str


def headers(file: File, start: int = 0) -> Iterator[TarInfo | Damage | None]:
    """The members of a tar, from the header at `start` on, and what is damaged; None now and then,
    where the next one is far to seek. Between two, the file may be read, but no further than to the
    end of the member."""
    place: int | None = start
    while place is not None:
        place = yield from _from(file, place)


def _from(file: File, place: int) -> Generator[TarInfo | Damage | None, None, int | None]:
    """The members from the header at this place on. Returns where there are more, if anywhere."""
    start = place
    try:
        file.seek(place)
        tar = tarfile.TarFile(fileobj=cast(IO[bytes], file), encoding=_CODE, errors=_ERRORS)
        member = tar.next()
        while member:
            place = member.offset
            if member.size < 0 or tar.offset < member.offset_data:
                raise ValueError("a negative size")
            place = tar.offset
            yield member
            file.seek(place)
            # Unlike `next`, it keeps no list of members, and raises at the end, too.
            member = TarInfo.fromtarfile(tar)
        block = file.last
    except (tarfile.HeaderError, tarfile.ReadError):
        block = file.last
    except _UNREADABLE as error:
        if isinstance(error, OSError) and isinstance(file, Windowed):
            raise  # it cannot be read, which is no damage to the tar
        block = b"?" * BLOCK
    if len(block) == BLOCK and not block.strip(b"\0"):
        return None  # the mark that ends a tar
    if place == start == 0:
        yield Damage(0, "it is no tar" if block else "it is empty, and no tar")
    elif len(block) < BLOCK:
        yield Damage(place, "the tar has no end mark: it seems to be cut short")
    else:
        yield Damage(place, f"the tar is damaged at byte {place:,}")
        if isinstance(file, Windowed):
            for found in next_header(file, place + BLOCK, file.size):
                if found is not None:
                    return found
                yield None
    return None


def next_header(file: Windowed, place: int, end: int) -> Iterator[int | None]:
    """Where the next block is that looks like a header, from `place` up to `end`; None now and
    then, where that is far."""
    file.seek(place)
    while place < end and (blocks := file.read(TOGETHER * BLOCK)):
        for start in range(0, len(blocks), BLOCK):
            if _is_header(blocks[start : start + BLOCK]):
                yield place + start
                return
        place += len(blocks)
        yield None


def _is_header(block: bytes) -> bool:
    if block[_MAGIC_PLACE] != _MAGIC:
        return False
    try:
        TarInfo.frombuf(block, _CODE, _ERRORS)
    except (tarfile.HeaderError, ValueError):
        return False
    return True
