"""Leaving resfeat's own outputs out of a stream of keys, where nobody can look ahead.

A folder is one if there is a key below its `_resfeat/`. Keys of it come before that one, so keys
are held back until it must have come, or, once they are many, until somebody had a look.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow as pa

MARK = "_resfeat"
HELD = 20_000  # keys


class Run(NamedTuple):
    """Objects right in one folder that follow one another: some rows of a page."""

    folder: str  # with its last slash; empty at the top of a bucket
    first: str  # key
    last: str
    page: pa.RecordBatch
    start: int
    end: int


class Outputs:
    """Takes runs in key order, and gives back those that are in no output below the folder `top`.

    is_output: has a look whether a folder is one. skipped: counts them.
    """

    def __init__(self, top: str, is_output: Callable[[str], bool], skipped: Counter[str]) -> None:
        self._top, self._is_output, self._skipped = top, is_output, skipped
        self._held: deque[Run] = deque()
        self._count = 0
        self._folder = top  # of the last run
        self._doubtful: list[str] = []  # folders above it that may be one yet
        self._output: str | None = None  # the one that it was in

    def take(self, run: Run) -> Iterator[Run]:
        """The runs that are known to be in none by now."""
        if self._output is not None and run.folder.startswith(self._output):
            return
        self._output = None
        new = [folder for folder in self._above(run.folder) if not self._folder.startswith(folder)]
        self._doubtful = [
            folder
            for folder in [*self._doubtful, *new]
            if run.first.startswith(folder)
            and run.first < f"{folder}{MARK}0"  # behind all of its mark
        ]
        self._folder = run.folder
        for folder in self._doubtful:
            if run.first.startswith(f"{folder}{MARK}/"):
                self._drop(folder)
                yield from self._known()
                return
        self._held.append(run)
        self._count += run.end - run.start
        self._doubtful = [folder for folder in self._doubtful if run.last < f"{folder}{MARK}/"]
        yield from self._known()
        if self._count > HELD:
            for folder in self._doubtful:
                if self._is_output(folder):
                    self._drop(folder)
                    break
            self._doubtful = []
            yield from self._known()

    def rest(self) -> Iterator[Run]:
        """What is left once all runs were taken."""
        self._doubtful = []
        yield from self._known()

    def _above(self, folder: str) -> Iterator[str]:
        """The folders below `top` on the way to one, and itself."""
        at = len(self._top)
        while (at := folder.find("/", at) + 1) > 0:
            yield folder[:at]

    def _drop(self, output: str) -> None:
        self._skipped["resfeat output"] += 1
        self._output = output
        while self._held and self._held[-1].folder.startswith(output):
            run = self._held.pop()
            self._count -= run.end - run.start
        self._doubtful = [folder for folder in self._doubtful if not folder.startswith(output)]

    def _known(self) -> Iterator[Run]:
        while self._held and not (
            self._doubtful and self._held[0].folder.startswith(self._doubtful[0])
        ):
            run = self._held.popleft()
            self._count -= run.end - run.start
            yield run
