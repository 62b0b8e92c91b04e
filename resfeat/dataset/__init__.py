"""All that lies in an output folder: its paths, its record, its parts and who writes them."""

from resfeat.dataset.commit import Part, digests, kept_rows
from resfeat.dataset.documents import read_json, write_json
from resfeat.dataset.layout import Layout
from resfeat.dataset.lock import Lock, holder, run_lock
from resfeat.dataset.reader import Dataset, open_dataset
from resfeat.dataset.record import Record
from resfeat.dataset.schema import FAILURES, FailedItem, Row, embeddings_schema

__all__ = [
    "FAILURES",
    "Dataset",
    "FailedItem",
    "Layout",
    "Lock",
    "Part",
    "Record",
    "Row",
    "digests",
    "embeddings_schema",
    "holder",
    "kept_rows",
    "open_dataset",
    "read_json",
    "run_lock",
    "write_json",
]
