"""Rows as torch takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from resfeat.errors import ResfeatError, UsageError

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
        table = None if label is None else dataset.table(["id", label])
        labels = None if table is None else table[label].to_pylist()
        if labels and (without := labels.count(None)):
            raise UsageError(
                f"{dataset.layout.root}: {without} of {len(labels)} rows have no '{label}': leave "
                "them out of what you extract, or give label=None"
            )
        blocks = list(dataset.vectors(layer=layer))
        if not blocks:
            raise dataset.empty()
        vectors = torch.from_numpy(np.concatenate([some for _, some in blocks]))
        if labels is None or table is None:
            return cls(vectors, None, [])
        if [key for ids, _ in blocks for key in ids.to_pylist()] != table["id"].to_pylist():
            raise ResfeatError(f"{dataset.layout.root} has changed while it was read: try again")
        classes, targets = np.unique(labels, return_inverse=True)
        return cls(vectors, torch.from_numpy(targets), classes.tolist())

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, row: int) -> Any:
        if self.targets is None:
            return self.vectors[row]
        return self.vectors[row], int(self.targets[row])
