"""Memory for large pictures: as many are decoded at a time as there is room for."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock

# Bytes that a pixel takes while it is decoded, at most (WebP).
PIXEL_BYTES = 16


class Room:
    """Room for so many pixels. What is too large for all of it is let in alone."""

    def __init__(self, pixels: int) -> None:
        self._free = self._all = max(1, pixels)
        self._changed = Condition()
        self._turn = Lock()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait for room, and have it. First come, first served: small ones pass no large one by."""
        taken = min(pixels, self._all)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= taken)
            self._free -= taken
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify()
