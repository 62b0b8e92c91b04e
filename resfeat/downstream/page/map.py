"""A bounded sample of a dataset's vectors: laid out in two dimensions, and what in it is alike."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from resfeat.downstream.duplicates import Links
from resfeat.downstream.unit import unit
from resfeat.errors import UsageError, missing

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

Kind = Literal["pca", "umap"]

SAMPLE = 4096
# For the principal axes: vectors that are turned at once, and how often.
BLOCK, TURNS = 8, 40
# A cosine from which on two images count as nearly the same.
NEAR = 0.99
LEAST_FOR_UMAP = 5


@dataclass(frozen=True)
class Sample:
    """Some rows of a dataset, spread evenly over it: their ids, and their embeddings float32
    [n, D] at unit length, since cosine is what is compared. rows: how many the dataset has."""

    ids: list[str]
    units: NDArray[np.float32]
    rows: int


def draw(dataset: Dataset, layer: str | None = None, most: int = SAMPLE) -> Sample:
    """At most so many rows, read as they stream by: what is kept is all the memory that it takes.
    Raises UsageError where the dataset has none."""
    rows = dataset.rows()
    wanted = np.linspace(0, rows - 1, min(rows, most)).astype(np.int64)
    ids, kept, start = list[str](), list[NDArray[np.float32]](), 0
    for some, vectors in dataset.vectors(layer=layer):
        first, last = np.searchsorted(wanted, [start, start + len(some)])
        places = wanted[first:last] - start
        ids += some.take(places).to_pylist()
        kept.append(vectors[places])
        start += len(some)
    if not ids:
        raise dataset.empty()
    return Sample(ids, unit(np.concatenate(kept)), rows)


def lay_out(sample: Sample, kind: Kind) -> tuple[NDArray[np.float32], float | None]:
    """A place [n, 2] for each row, from 0 to 1, and the share of the variance that the two axes
    have, which UMAP's do not tell. Raises UsageError where UMAP is missing, or has too few rows."""
    share = None
    if kind == "umap":
        places = _umap(sample.units)
    else:
        places, share = principal(sample.units)
    low = places.min(axis=0)
    span = places.max(axis=0) - low
    return (places - low) / np.where(span > 0, span, 1), share


def principal(units: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Coordinates [n, 2] along the first two principal axes, and their share of the variance.

    By turning a block of vectors towards the axes (subspace iteration): the covariance of 2,048
    dimensions, taken apart whole, would take seconds.
    """
    centred = units - units.mean(axis=0)
    width = min(BLOCK, *centred.shape)
    axes = np.random.default_rng(0).standard_normal((centred.shape[1], width)).astype(np.float32)
    for _ in range(TURNS):
        axes = np.linalg.qr(centred.T @ (centred @ axes))[0]
    within = centred @ axes
    _, values, turn = np.linalg.svd(within, full_matrices=False)
    places = np.zeros((len(units), 2), np.float32)
    first = (within @ turn.T)[:, :2]
    # An axis has no direction of its own: its largest entry decides, so that the map stays so.
    largest = np.take_along_axis(first, np.abs(first).argmax(axis=0)[None], axis=0)
    places[:, : first.shape[1]] = first * np.where(largest < 0, -1, 1)
    total = float((centred**2).sum())
    return places, float((values[:2] ** 2).sum()) / total if total else 0.0


def _umap(units: NDArray[np.float32]) -> NDArray[np.float32]:
    if len(units) < LEAST_FOR_UMAP:
        raise UsageError(f"UMAP needs at least {LEAST_FOR_UMAP} images: give --map pca")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a fixed seed keeps it to one thread
        try:
            from umap import UMAP
        except ImportError as error:
            raise missing("--map umap", "umap-learn", "umap", ", or give --map pca") from error
        fitted = UMAP(n_neighbors=min(15, len(units) - 1), metric="cosine", random_state=0)
        places: NDArray[np.float32] = fitted.fit_transform(units)
    return places


def spread(places: NDArray[np.float32], most: int, cells: int = 24) -> list[int]:
    """The rows to show pictures of, at most so many: the next one of each cell of a grid in turn,
    so that thin regions have theirs as well as crowded ones."""
    cell = (np.minimum(places, 0.9999) * cells).astype(np.int64) @ [cells, 1]
    order = np.argsort(cell, kind="stable")
    _, starts = np.unique(cell[order], return_index=True)
    turn = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return [int(row) for row in order[np.argsort(turn, kind="stable")][:most]]


def alike(sample: Sample, near: float = NEAR) -> list[tuple[list[int], float]]:
    """Groups of rows that are linked by cosines of at least `near`, the largest group first, each
    with the least cosine within it, which a chain of links may have brought below `near`."""
    units, links = sample.units, Links(len(sample.ids))
    for start in range(0, len(units), 512):
        left, right = np.nonzero(units[start : start + 512] @ units.T >= near)
        links.link(left + start, right)
    groups = sorted(links.groups(), key=len, reverse=True)
    return [(rows.tolist(), float((units[rows] @ units[rows].T).min())) for rows in groups]
