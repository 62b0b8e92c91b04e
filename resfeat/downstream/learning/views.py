"""Views: what each of several datasets made of the same images, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resfeat.dataset import open_dataset
from resfeat.errors import UsageError

if TYPE_CHECKING:
    from resfeat.dataset import Dataset


@dataclass(frozen=True)
class View:
    """The embeddings of one layer of one dataset. name: as it was given, with the layer where there
    are several. dims: the length of each vector."""

    name: str
    path: str
    fingerprint: str
    model: str
    layer: str
    dims: int

    @classmethod
    def of(cls, path: str, dataset: Dataset, layer: str | None) -> View:
        """layer: the last one where it is None. Raises UsageError where there is none such, or
        no embedding yet."""
        root, identity = str(dataset.layout.root), dataset.record.identity
        layer = dataset.layer_of(layer)
        if (dims := dataset.dim(layer)) is None:
            raise dataset.empty()
        name = f"{path}:{layer}" if len(identity.layers) > 1 else path
        return cls(name, root, identity.fingerprint, identity.model, layer, dims)


def open_views(
    paths: Sequence[str], layers: Sequence[str] = ()
) -> tuple[list[Dataset], list[View]]:
    """Datasets and what is to be seen of each. layers: one for all, or one each; none takes the
    last. Raises UsageError where two are the same embeddings, of which nothing is learned twice."""
    if len(layers) not in (0, 1, len(paths)):
        raise UsageError(f"{len(layers)} layers for {len(paths)} datasets: give one, or one each")
    chosen: Sequence[str | None] = layers or [None]
    chosen = chosen if len(chosen) == len(paths) else [*chosen] * len(paths)
    datasets = [open_dataset(path) for path in paths]
    views = [View.of(*each) for each in zip(paths, datasets, chosen, strict=True)]
    first: dict[tuple[str, str], View] = {}
    for view in views:
        twin = first.setdefault((view.fingerprint, view.layer), view)
        if twin is not view:
            raise UsageError(
                f"{twin.path} and {view.path} hold the same kind of embeddings ({view.model}, "
                f"{view.layer}): give datasets of different models, weights or layers"
            )
    return datasets, views
