"""resfeat: folders full of images become embeddings in Parquet.

The command `resfeat` and these calls do the same work:

    from resfeat import ExtractSpec, extract, open_dataset

    report = extract(ExtractSpec(sources=("photos",), output="embeddings"))
    dataset = open_dataset("embeddings")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resfeat.dataset import open_dataset
    from resfeat.errors import ResfeatError
    from resfeat.extraction import extract
    from resfeat.reporting.report import Report
    from resfeat.spec import ExtractSpec, RuntimeOptions

__version__ = "0.2.0"
__all__ = ["ExtractSpec", "Report", "ResfeatError", "RuntimeOptions", "extract", "open_dataset"]

_HOME = {
    "ExtractSpec": "resfeat.spec",
    "Report": "resfeat.reporting.report",
    "ResfeatError": "resfeat.errors",
    "RuntimeOptions": "resfeat.spec",
    "extract": "resfeat.extraction",
    "open_dataset": "resfeat.dataset.reader",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `resfeat --help` pays for neither torch, pyarrow nor Ray.
    if name not in _HOME:
        raise AttributeError(f"module 'resfeat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
