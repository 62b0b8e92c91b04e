"""Rows as torch takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from resfeat.errors import UsageError

if TYPE_CHECKING:
    from resfeat.dataset.reader import Dataset


class Examples(torch.utils.data.Dataset[Any]):
    """Embeddings and the numbers of their labels, by row. A `DataLoader` takes it.

    vectors: float32 [N, D]. targets: int64 [N], places in `classes`; None where there are none.
    """

    def __init__(self, vectors: Tensor, targets: Tensor | None, classes: list[Any]) -> None:
        self.vectors, self.targets, self.classes = vectors, targets, classes

    @classmethod
    def of(cls, dataset: Dataset, label: str | None, layer: str | None) -> Self:
        """As `Dataset.torch` says."""
        labels = None if label is None else dataset.labels(label)
        if labels and (without := labels.count(None)):
            raise UsageError(
                f"{dataset.layout.root}: {without} of {len(labels)} rows have no '{label}': leave "
                "them out of what you extract, or give label=None"
            )
        parts = [vectors for _, vectors in dataset.vectors(layer=layer)]
        if not parts:
            raise dataset.empty()
        vectors = torch.from_numpy(np.concatenate(parts))
        if labels is None:
            return cls(vectors, None, [])
        classes, targets = np.unique(labels, return_inverse=True)
        return cls(vectors, torch.from_numpy(targets), classes.tolist())

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, row: int) -> Any:
        if self.targets is None:
            return self.vectors[row]
        return self.vectors[row], int(self.targets[row])
