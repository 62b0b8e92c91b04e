"""All that lies in an output folder: its paths, its record, its parts and who writes them."""

from resfeat.dataset.card import write_card
from resfeat.dataset.commit import Part
from resfeat.dataset.generation import commit_generation
from resfeat.dataset.holding import held, is_alone, whole, writable
from resfeat.dataset.layout import ALL, Layout
from resfeat.dataset.lease import check_lease
from resfeat.dataset.lock import holder, run_lock
from resfeat.dataset.notes import Commits
from resfeat.dataset.parts import Block, Parts, digests_of
from resfeat.dataset.reader import Dataset, Kept, kept_rows, open_dataset
from resfeat.dataset.record import Record
from resfeat.dataset.schema import FailedItem, Row, embeddings_schema, vector_hashes
from resfeat.dataset.writer import Lock

__all__ = [
    "ALL", "Block", "Commits", "Dataset", "FailedItem", "Kept", "Layout", "Lock", "Part", "Parts",
    "Record", "Row", "check_lease", "commit_generation", "digests_of", "embeddings_schema", "held",
    "holder", "is_alone", "kept_rows", "open_dataset", "run_lock", "vector_hashes", "whole",
    "writable", "write_card",
]  # fmt: skip
