"""The headers of a tar in a store, many at once, without what lies between them.

A header says where the next one is, so a tar can only be followed from its beginning, and in a
store each step waits for an answer. Therefore stretches of what comes are followed at once, each
from the first block in it that looks like a header. Only the bytes that they fetched are kept:
whoever reads the tar from its beginning finds them there, or fetches what is missing. A stretch
that was misled, by a tar within a member, say, costs time and nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import Executor
from contextlib import suppress
from tarfile import TarInfo

from resfeat.sources.headers import BLOCK, headers, next_header
from resfeat.sources.windowed import Windowed

# Stretches that are followed at once, and members of each. To find the first takes half a member.
AT_ONCE, MEMBERS = 64, 64
# A header with the one or two that say more about the same member: a long name, say.
HEADER = 1536
# Bytes from one header to the next, on average, from which on each is worth a request. Streaming is
# quicker for what is smaller.
APART = 64 * 1024
# What is read at first, to see how far apart they are.
FIRST = 256 * 1024


class Ahead(Windowed):
    """The same file, to be read from header to header."""

    def __init__(self, file: Windowed, pool: Executor) -> None:
        super().__init__(file.fetch, file.size, file.hop, file.on)
        self._pool, self._seeks = pool, 0
        self._end, self._starts, self._pieces = 0, list[int](), dict[int, bytes]()

    def seek(self, place: int) -> int:
        self._seeks += 1
        return super().seek(place)

    def _fetched(self, place: int, count: int) -> bytes:
        if not place:
            return self.fetch(0, min(max(FIRST, count), self.size))
        apart = place // self._seeks
        if place >= self._end and apart >= APART:
            self._look(place, MEMBERS * apart // BLOCK * BLOCK)
        at = bisect_right(self._starts, place) - 1
        if at >= 0:
            start = self._starts[at]
            rest = self._pieces[start][place - start :]
            if len(rest) >= count:
                return rest
        return super()._fetched(place, count)

    def _look(self, place: int, length: int) -> None:
        """Fetch the headers from this place on, in stretches of this length."""
        self._end = min(self.size, place + AT_ONCE * length)
        starts = range(place, self._end, length)
        self._pieces = {}
        for found in self._pool.map(lambda start: self._along(start, start + length), starts):
            self._pieces |= found
        self._starts = sorted(self._pieces)

    def _along(self, start: int, end: int) -> dict[int, bytes]:
        """What was fetched to follow the headers of a stretch, by its places."""
        found = dict[int, bytes]()

        def fetch(place: int, length: int) -> bytes:
            return found.setdefault(place, self.fetch(place, length))

        file = Windowed(fetch, self.size, HEADER, HEADER)
        with suppress(OSError):  # whoever reads the tar will meet it, too
            if (place := next(filter(None, next_header(file, start, end)), None)) is None:
                return {}
            found = dict(list(found.items())[-1:])
            for member in headers(file, place):
                if not isinstance(member, TarInfo) or member.offset_data + member.size >= end:
                    break
        return found
