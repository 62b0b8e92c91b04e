"""Nearest neighbours by exact cosine, streamed over the parts of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from resfeat.errors import Failure, ResfeatError, UsageError
from resfeat.spec import FeatureSpec

if TYPE_CHECKING:
    from resfeat.dataset import Dataset


@dataclass(frozen=True)
class Neighbour:
    """An image of the dataset and the cosine (-1 to 1) between its embedding and the query's."""

    id: str
    cosine: float


def embed_queries(
    dataset: Dataset, paths: Sequence[str], layer: str | None = None
) -> NDArray[np.float32]:
    """Embeddings float32 [len(paths), D] of image files, made as the dataset's own were.

    layer: which embedding of several; the last where it is not given. Raises UsageError for a layer
    that is not there or a file that gives no pixels, and ResfeatError where the weights that the
    dataset was made with cannot be found again.
    """
    from resfeat import runtimes
    from resfeat.backbones.weights import resolve
    from resfeat.decoding.decode import decode
    from resfeat.fidelity.calibration import is_intact
    from resfeat.sources import read, uri_of

    identity = dataset.record.identity
    dataset.check_layer(layer)
    pictures = []
    for path in paths:
        content = read(uri_of(path))
        picture = (
            content
            if isinstance(content, Failure)
            else decode(content[0], identity.preprocessing, identity.decode)
        )
        if isinstance(picture, Failure):
            raise UsageError(f"cannot use {path} as a query: {picture.reason}, {picture.message}")
        pictures.append(picture.pixels)
    weights = resolve(FeatureSpec.of(identity, dataset.record.weights))
    if weights.identity != identity:
        raise ResfeatError(
            f"{dataset.layout.root} was made with other weights than {dataset.record.weights} are "
            "now: bring back the file that it was made with"
        )
    if identity.precision == "int8" and not is_intact(dataset.layout, dataset.record):
        raise ResfeatError(
            f"{dataset.layout.quantised} is gone or changed, and queries need the network that the "
            "dataset was made with: bring it back"
        )
    name = runtimes.choose(None, identity.model, identity.precision, "cpu")
    network = runtimes.prepare(name, identity, weights.tensors, dataset.layout.quantised)
    runtime = runtimes.start(name, identity, network, device="cpu", threads=1, batch_size=1)
    every = np.concatenate([runtime.embed(picture[None]) for picture in pictures])
    bounds = np.cumsum(list(weights.dims.values()))[:-1]
    by_layer = dict(zip(weights.dims, np.split(every, bounds, axis=1), strict=True))
    return by_layer[layer or identity.layers[-1]]


def search(
    dataset: Dataset, queries: NDArray[np.float32], k: int, layer: str | None = None
) -> list[list[Neighbour]]:
    """The k nearest images to each query, float32 [Q, D], nearest first; ties in plan order.

    layer: which embedding of several; the last where it is not given.
    """
    directions = _normalise(queries)
    best: list[list[Neighbour]] = [[] for _ in queries]
    for ids, vectors in dataset.vectors(layer=layer):
        cosines = directions @ _normalise(vectors).T
        for row, nearest in zip(cosines, best, strict=True):
            order = np.argsort(-row, kind="stable")[:k]
            nearest += [Neighbour(ids[int(i)].as_py(), float(row[i])) for i in order]
            nearest.sort(key=lambda neighbour: -neighbour.cosine)
            del nearest[k:]
    return best


def _normalise(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1  # an all-zero vector is near to nothing
    return vectors / lengths
