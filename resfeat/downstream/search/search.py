"""Nearest neighbours, and what a user may ask for by them."""

from __future__ import annotations

import os
from numbers import Integral
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from resfeat.dataset import Dataset, open_dataset
from resfeat.downstream.search.exact import Metric, Neighbours, scan
from resfeat.errors import UsageError
from resfeat.keywords import Address


def nearest(
    dataset: Address | Dataset,
    queries: NDArray[np.float32],
    k: int = 10,
    layer: str | None = None,
    metric: Metric = "cosine",
) -> Neighbours:
    """The k nearest images to each query, float32 [Q, D], or to one, [D].

    layer: which embedding of several; the last by default. metric: "cosine", which no length
    matters to, or "l2", the distance. Raises UsageError for queries that are no embeddings of this
    dataset, and for an unknown layer or metric.
    """
    if metric not in get_args(Metric):
        raise UsageError(f"--metric {metric}: give one of {', '.join(get_args(Metric))}")
    check_k(k)
    if isinstance(dataset, str | os.PathLike):
        dataset = open_dataset(dataset)
    dataset.check_layer(layer)
    queries = np.atleast_2d(queries)
    check_vectors(dataset, queries, "the queries", layer)
    return scan(dataset, queries, k, layer, metric)


def check_k(k: int) -> None:
    """Raise UsageError for less than 1. More than there are images gives all of them."""
    if not isinstance(k, Integral):
        raise UsageError(f"-k {k}: give a whole number")
    if k < 1:
        raise UsageError(f"-k {k}: give at least 1")


def check_vectors(
    dataset: Dataset, vectors: NDArray[np.float32], name: str, layer: str | None = None
) -> None:
    """Raise UsageError, naming them, for what are no embeddings [Q, D] of this dataset."""
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise UsageError(
            f"{name}: {vectors.dtype} {list(vectors.shape)} are no embeddings: give float32 [Q, D]"
        )
    if not len(vectors):
        raise UsageError(f"{name}: no vectors are in it: give float32 [Q, D]")
    length = dataset.dim(layer)
    if length is not None and vectors.shape[1] != length:
        raise UsageError(
            f"{name}: vectors of {vectors.shape[1]} numbers, and {dataset.layout.root} has "
            f"{length}: give embeddings of the same model and layer"
        )
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        raise UsageError(
            f"{name}: vector {int(np.argmin(finite))} is not all finite numbers: leave it out"
        )
