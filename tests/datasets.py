"""Reading datasets in tests, with pyarrow alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray


def rows(output: Path, kind: str = "embeddings") -> pa.Table:
    """All rows of a dataset's folder, by id."""
    return ds.dataset(output / kind, format="parquet").to_table().sort_by("id")


def vectors(table: pa.Table) -> NDArray[np.float32]:
    """The embeddings of rows as an array [N, D]."""
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(table), -1)
