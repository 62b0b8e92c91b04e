"""How fast each worker of a run was, from its beginning to its end."""

from __future__ import annotations

from resfeat.worker import ShardResult

SPANS = 40  # of equal length, from the first worker to the last commit


class Course:
    """What each worker committed, and when it did that."""

    def __init__(self) -> None:
        self._done: dict[int, list[tuple[float, float, int]]] = {}

    def add(self, result: ShardResult, at: float) -> None:
        """A shard was committed, by `time.monotonic`."""
        images = result.embedded + result.failed
        self._done.setdefault(result.worker, []).append((at - result.took, at, images))

    def rates(self, begun: float, ended: float) -> dict[str, list[float]]:
        """Images per second by worker, in each of `SPANS` spans between two times. A shard's images
        count evenly over the time that it took. Empty where no time passed."""
        span = (ended - begun) / SPANS
        if span <= 0:
            return {}
        return {
            str(worker): [round(each / span, 2) for each in _shared(shards, begun, span)]
            for worker, shards in sorted(self._done.items())
        }


def _shared(shards: list[tuple[float, float, int]], begun: float, span: float) -> list[float]:
    """Images in each span."""
    found = [0.0] * SPANS
    for start, end, images in shards:
        start = max(start, begun)
        # In spans; what took no time at all is put down to a moment.
        first, last = ((each - begun) / span for each in (start, max(end, start + 1e-6)))
        for n in range(min(int(first), SPANS - 1), SPANS):
            overlap = min(last, n + 1) - max(first, n)
            if overlap <= 0:
                break
            found[n] += images * overlap / (last - first)
    return found
