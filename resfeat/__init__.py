"""resfeat: folders full of images become embeddings in Parquet.

The command `resfeat` and these calls do the same work:

    import resfeat

    report = resfeat.extract("photos", "embeddings", model="resnet50")
    dataset = resfeat.open_dataset("embeddings")
    vectors = resfeat.Embedder.of("embeddings")(["cat.jpg"])
    found = resfeat.nearest(dataset, vectors, k=5)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resfeat.dataset import open_dataset
    from resfeat.downstream.embedder import Embedder
    from resfeat.downstream.search import nearest
    from resfeat.errors import ResfeatError
    from resfeat.extraction import extract
    from resfeat.reporting.report import Report
    from resfeat.spec import ExtractSpec, RuntimeOptions

__version__ = "0.2.0"
__all__ = [
    "Embedder", "ExtractSpec", "Report", "ResfeatError", "RuntimeOptions", "extract", "nearest",
    "open_dataset",
]  # fmt: skip

_HOME = {
    "Embedder": "resfeat.downstream.embedder",
    "ExtractSpec": "resfeat.spec",
    "Report": "resfeat.reporting.report",
    "ResfeatError": "resfeat.errors",
    "RuntimeOptions": "resfeat.spec",
    "extract": "resfeat.extraction",
    "nearest": "resfeat.downstream.search",
    "open_dataset": "resfeat.dataset.reader",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Lazy, so that `resfeat --help` pays for neither torch, pyarrow nor Ray.
    if name not in _HOME:
        raise AttributeError(f"module 'resfeat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
