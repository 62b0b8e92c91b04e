"""Groups of what is linked, directly or by way of others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]


class Links:
    """Groups of `count` things, which grow together as pairs are linked."""

    def __init__(self, count: int) -> None:
        self._above = np.arange(count)  # another of its group; itself for the first

    def link(self, left: Places, right: Places) -> None:
        """Link each of `left` with that of `right`."""
        while len(left):
            tops = self._top(left), self._top(right)
            first, last = np.minimum(*tops), np.maximum(*tops)
            apart = first != last
            if not apart.any():
                return
            # Of several that would be put above one, one is; the others come again.
            left, right = np.unique([first[apart], last[apart]], axis=1)
            self._above[right] = left

    def _top(self, of: Places) -> Places:
        top: Places = self._above[of]
        while not np.array_equal(higher := self._above[top], top):
            top = higher
        self._above[of] = top
        return top

    def apart(self, left: Places, right: Places) -> NDArray[np.bool_]:
        """Of which pairs the two are in different groups."""
        apart: NDArray[np.bool_] = self._top(left) != self._top(right)
        return apart

    def groups(self) -> list[Places]:
        """Those of two or more, each ascending, in the order of their first."""
        tops = self._top(np.arange(len(self._above)))
        order = np.argsort(tops, kind="stable")
        bounds = np.flatnonzero(np.diff(tops[order])) + 1
        return [group for group in np.split(order, bounds) if len(group) > 1]
