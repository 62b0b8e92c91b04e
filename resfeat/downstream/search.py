"""Nearest neighbours by exact cosine, streamed over the parts of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from resfeat import runtimes
from resfeat.decoding import load, quiet
from resfeat.errors import Failure, ResfeatError, UsageError
from resfeat.fidelity import is_intact
from resfeat.sources import item_of
from resfeat.spec import FeatureSpec

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights
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

    layer: which embedding of several; the last by default. Raises UsageError for an unknown layer
    and for a file that does not decode, ResfeatError if no such embeddings can be made any more.
    """
    identity = dataset.record.identity
    dataset.check_layer(layer)
    pictures = []
    for path in paths:
        with quiet():
            loaded = load(item_of(path), identity.preprocessing, identity.decode)
        if isinstance(loaded, Failure):
            raise UsageError(f"cannot use {path} as a query: {loaded.reason}, {loaded.message}")
        pictures.append(loaded.picture.pixels)
    weights = _weights(dataset)
    name = runtimes.choose(None, identity.model, identity.precision, "cpu")
    network = runtimes.prepare(name, identity, weights.tensors, dataset.layout.quantised)
    runtime = runtimes.start(network, device="cpu", threads=1, batch_size=1)
    every = np.concatenate([runtime.embed(picture[None]) for picture in pictures])
    bounds = np.cumsum(list(weights.dims.values()))[:-1]
    by_layer = dict(zip(weights.dims, np.split(every, bounds, axis=1), strict=True))
    return by_layer[layer or identity.layers[-1]]


def _weights(dataset: Dataset) -> Weights:
    """The dataset's weights, found again. Raises ResfeatError if embeddings would be others now."""
    from resfeat.backbones.weights import resolve

    record, layout = dataset.record, dataset.layout
    weights = resolve(FeatureSpec.of(record.identity, record.weights))
    there, now = record.identity.as_dict(), weights.identity.as_dict()
    if there["weights_digest"] != now["weights_digest"]:
        raise ResfeatError(
            f"{layout.root} was made with other weights than {record.weights} are now: bring back "
            "the file that it was made with"
        )
    for name, value in there.items():
        if value != now[name]:
            made_by = record.versions.get("resfeat", "the version that made it")
            raise ResfeatError(
                f"{layout.root} was made with another {name} ({value} there, {now[name]} now): "
                f"search it with resfeat {made_by}, or extract it anew"
            )
    if record.identity.precision == "int8" and not is_intact(layout, record):
        raise ResfeatError(
            f"{layout.quantised} is gone or changed, and queries need the network that the "
            "dataset was made with: bring it back"
        )
    return weights


def search(
    dataset: Dataset, queries: NDArray[np.float32], k: int, layer: str | None = None
) -> list[list[Neighbour]]:
    """The k nearest images to each query, float32 [Q, D], nearest first; ties in plan order.

    layer: which embedding of several; the last by default.
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
    lengths[lengths == 0] = 1  # an all-zero vector has a cosine of 0 to all
    return vectors / lengths
