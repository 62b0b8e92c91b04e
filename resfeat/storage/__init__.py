"""Files on a disk or in an object store: paths, drafts that appear whole, and reading Parquet."""

from resfeat.storage.draft import Draft, draft, sha256, write_json, write_whole
from resfeat.storage.location import (
    Location,
    file_system_of,
    is_remote,
    locate,
    make_folder,
    remove,
    remove_all,
)
from resfeat.storage.parquet import dataset_of, open_binary, open_parquet
from resfeat.storage.remote import SCHEME, StorePath, is_refused, patiently, store

__all__ = [
    "SCHEME", "Draft", "Location", "StorePath", "dataset_of", "draft", "file_system_of",
    "is_refused", "is_remote", "locate", "make_folder", "open_binary", "open_parquet", "patiently",
    "remove", "remove_all", "sha256", "store", "write_json", "write_whole",
]  # fmt: skip
