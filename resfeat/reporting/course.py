"""How fast each worker of a run was, from its beginning to its end."""

from __future__ import annotations

from itertools import pairwise

SPANS = 40  # of equal length, from the first worker to the last commit


class Course:
    """What each worker committed, and when."""

    def __init__(self) -> None:
        self._commits: dict[int, list[tuple[float, int]]] = {}

    def add(self, worker: int, at: float, images: int) -> None:
        """A worker, by its number, has committed so many images, by `time.monotonic`."""
        self._commits.setdefault(worker, []).append((at, images))

    def rates(self, begun: float, ended: float) -> dict[str, list[float]]:
        """Images per second by worker, in each of `SPANS` spans between two times. A shard's images
        count evenly over the time since the worker's commit before. Empty where no time passed."""
        span = (ended - begun) / SPANS
        if span <= 0:
            return {}
        return {
            str(worker): [round(each / span, 2) for each in _shared(commits, begun, span)]
            for worker, commits in sorted(self._commits.items())
        }


def _shared(commits: list[tuple[float, int]], begun: float, span: float) -> list[float]:
    """Images in each span."""
    found = [0.0] * SPANS
    for (before, _), (at, images) in pairwise([(begun, 0), *commits]):
        # In spans; two commits at the same moment are one after the other.
        first, last = ((each - begun) / span for each in (before, max(at, before + 1e-6)))
        for n in range(min(int(first), SPANS - 1), SPANS):
            overlap = min(last, n + 1) - max(first, n)
            if overlap <= 0:
                break
            found[n] += images * overlap / (last - first)
    return found
