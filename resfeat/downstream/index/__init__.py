"""The index of a dataset, by FAISS: made, kept up to date, measured and searched."""

from resfeat.downstream.index.index import About, Index, open_index, usable_index
from resfeat.downstream.index.indexing import Wanted, build_index
from resfeat.downstream.index.kinds import COARSE, Auto, Kind, prepared, write_index

__all__ = [
    "COARSE", "About", "Auto", "Index", "Kind", "Wanted", "build_index", "open_index", "prepared",
    "usable_index", "write_index",
]  # fmt: skip
