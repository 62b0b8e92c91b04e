"""What a user asks for the nearest of: image files, folders of them, ids, or vectors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from resfeat.downstream.search.search import check_vectors
from resfeat.errors import Failure, UsageError, first_line, no_embedding
from resfeat.sources import Item, item_of, listing, printable
from resfeat.spec import SourceOptions

if TYPE_CHECKING:
    from resfeat.dataset import Dataset


@dataclass(frozen=True)
class Queries:
    """names: as the user knows them. vectors: float32 [Q, D]. items: their images; None of a vector
    that was given as such. images: how many were to be embedded. failed: those of
    folders of which there is no embedding, by name."""

    names: Sequence[str]
    vectors: NDArray[np.float32]
    items: Sequence[Item | None]
    images: int = 0
    failed: Mapping[str, Failure] = field(default_factory=dict)


def queries_of(
    dataset: Dataset, given: Sequence[str], ids: Sequence[str] = (), layer: str | None = None
) -> Queries:
    """Images, folders and .npy files that are given, in their order, then images of the dataset by
    id. Images are embedded as the dataset's own were; those of a folder that give no embedding are
    left out. Raises UsageError for whatever else cannot be used, and where nothing is left, and
    ResfeatError if no such embeddings can be made any more."""
    dataset.check_layer(layer)
    parts: list[Queries] = []
    images: list[tuple[str, Item]] = []
    for name in given:
        if name.lower().endswith(".npy"):
            parts += [_embedded(dataset, images, layer), _read(dataset, name, layer)]
            images = []
        elif os.path.isdir(name):
            images += _listed(name)
        else:
            images.append((name, item_of(name)))
    parts += [_embedded(dataset, images, layer), _known(dataset, ids, layer)]
    count = sum(part.images for part in parts)
    failed = {name: failure for part in parts for name, failure in part.failed.items()}
    parts = [part for part in parts if part.names]
    if not parts:
        raise no_embedding(failed)
    return Queries(
        [name for part in parts for name in part.names],
        np.concatenate([part.vectors for part in parts]),
        [item for part in parts for item in part.items],
        count,
        failed,
    )


def _listed(folder: str) -> list[tuple[str, Item]]:
    items = list(listing([folder], SourceOptions()))
    if not items:
        raise UsageError(f"no images in {folder}: give a folder that has some")
    return [(os.path.join(folder, item.id), item) for item in items]


def _embedded(dataset: Dataset, images: Sequence[tuple[str, Item]], layer: str | None) -> Queries:
    if not images:
        return _NOTHING
    from resfeat.downstream.embedder import Embedder  # brings torch, which ids and vectors need not

    names, items = zip(*images, strict=True)
    with closing(Embedder.of(dataset, layer)) as embedder:
        vectors, failures = embedder.attempt(items)
    failed = {name: failure for name, failure in zip(names, failures, strict=True) if failure}
    for name, item in zip(names, items, strict=True):
        if name in failed and item.id == name:  # it was given itself, not its folder
            raise no_embedding({name: failed[name]})
    whole = [n for n, failure in enumerate(failures) if not failure]
    return Queries(
        [names[n] for n in whole], vectors[whole], [items[n] for n in whole], len(items), failed
    )


def _read(dataset: Dataset, name: str, layer: str | None) -> Queries:
    try:
        vectors = np.load(Path(name), allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"cannot use {name} as a query: there is no such file") from None
    except (OSError, ValueError, EOFError) as error:
        # numpy's own words for any other content are of pickles, and of an option that we lack.
        why = first_line(error) if isinstance(error, OSError) else "no whole .npy of plain numbers"
        raise UsageError(
            f"cannot use {name} as queries ({why}): save float32 [Q, D] with np.save"
        ) from error
    vectors = np.atleast_2d(vectors)
    check_vectors(dataset, vectors, name, layer)
    return Queries([f"{name}[{n}]" for n in range(len(vectors))], vectors, [None] * len(vectors))


def _known(dataset: Dataset, ids: Sequence[str], layer: str | None) -> Queries:
    if not ids:
        return _NOTHING
    ids = [_as_listed(name) for name in ids]
    found = dataset.find(ids, layer)
    for name in ids:
        if name not in found:
            raise UsageError(
                f"{dataset.layout.root} has no embedding of the id '{name}': {_why(dataset, name)}"
            )
    items = dataset.items(ids)
    vectors = np.stack([found[name] for name in ids])
    return Queries(ids, vectors, [items.get(name) for name in ids])


def _why(dataset: Dataset, name: str) -> str:
    """Why there is no embedding of an id, or where ids stand."""
    import pyarrow.compute as pc

    from resfeat.dataset.reader import SENT_BACK, readable

    with readable(dataset.layout.failures, SENT_BACK):
        told = dataset.failures.to_table(filter=pc.field("id") == name).to_pylist()
    if told:
        return f"the image failed, {told[0]['reason']}: {told[0]['message']}"
    return "ids stand in the column `id`, and of what failed in failures/"


def _as_listed(name: str) -> str:
    """An id as a dataset has it, of a file's name whose bytes may be no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return printable(name)
    return name


_NOTHING = Queries((), np.empty((0, 0), np.float32), ())
