"""How well an index finds what exact search finds, and how hard it has to try."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resfeat.downstream.index.index import Measured
from resfeat.downstream.index.kinds import Kind, asked_of, efforts_of, faiss, set_effort
from resfeat.downstream.search import Metric

NEAREST = 10
RECALL = 0.95  # that a search is to have, if trying harder gives it
GAIN = 0.005  # of recall, for which it is not worth to try twice as hard


class Exact:
    """The nearest to queries [Q, D] among rows that are added, by comparing them with all."""

    def __init__(self, queries: NDArray[np.float32], metric: Metric) -> None:
        self.queries, self.rows = queries, 0
        self._metric = faiss().METRIC_L2 if metric == "l2" else faiss().METRIC_INNER_PRODUCT
        self._nearer = -1 if metric == "l2" else 1
        self._scores = np.empty((len(queries), 0), np.float32)
        self.found = np.empty((len(queries), 0), np.int64)

    def add(self, vectors: NDArray[np.float32], numbers: NDArray[np.int64]) -> None:
        self.rows += len(vectors)
        if not len(self.queries):
            return
        k = min(NEAREST, len(vectors))
        scores, at = faiss().knn(self.queries, vectors, k, self._metric)
        scores = np.hstack([self._scores, self._nearer * scores])
        found = np.hstack([self.found, numbers[at]])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :NEAREST]
        self._scores = np.take_along_axis(scores, order, axis=1)
        self.found = np.take_along_axis(found, order, axis=1)

    def recall_of(self, found: NDArray[np.int64]) -> float:
        """The share of the nearest that is among what was found [Q, m]."""
        pairs = zip(found, self.found, strict=True)
        return sum(len(np.intersect1d(*pair)) for pair in pairs) / self.found.size


def measure(
    index: Any,
    kind: Kind,
    exact: Exact,
    search: Callable[[], object],
    finish: Callable[[NDArray[np.float32], NDArray[np.int64]], object],
    generation: int,
) -> tuple[Measured, int]:
    """How a search does with the least effort that finds enough, and that effort. search: exact
    search for the queries. finish: what a search by it does with what FAISS gave, scores and
    numbers [Q, m]; of these the nearest are then the first, so it is enough that they are among
    them."""
    efforts, queries = efforts_of(kind, exact.rows), exact.queries
    if not len(queries):
        set_effort(index, kind, efforts[-1])
        return Measured(exact.rows, 0, None, 0, 0, generation), efforts[-1]
    wanted = asked_of(kind, NEAREST)
    started = time.perf_counter()
    search()
    exact_seconds = time.perf_counter() - started
    tries: list[tuple[float, float, int]] = []
    for effort in efforts:
        set_effort(index, kind, effort)
        started = time.perf_counter()
        scores, found = index.search(queries, min(wanted, exact.rows))
        finish(scores, found)
        seconds = time.perf_counter() - started
        tries.append((exact.recall_of(found), seconds, effort))
        if tries[-1][0] >= RECALL:
            break
    best = min(RECALL, max(recall for recall, *_ in tries) - GAIN)
    recall, seconds, effort = next(each for each in tries if each[0] >= best)
    set_effort(index, kind, effort)
    count = len(queries)
    return Measured(
        exact.rows, count, round(recall, 4), seconds / count, exact_seconds / count, generation
    ), effort
