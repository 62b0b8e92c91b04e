"""Files on a disk or in an object store: paths, drafts that appear whole, and reading Parquet."""

from resfeat.storage.draft import Draft, Drafts, draft, sha256, write_json, write_whole
from resfeat.storage.fence import Fence
from resfeat.storage.location import (
    Location,
    file_system_of,
    is_remote,
    locate,
    make_folder,
    remove,
    remove_all,
)
from resfeat.storage.parquet import dataset_of, open_parquet
from resfeat.storage.remote import SCHEME, StorePath, Version, is_refused, patiently, store

__all__ = [
    "SCHEME", "Draft", "Drafts", "Fence", "Location", "StorePath", "Version", "dataset_of", "draft",
    "file_system_of", "is_refused", "is_remote", "locate", "make_folder", "open_parquet",
    "patiently", "remove", "remove_all", "sha256", "store", "write_json", "write_whole",
]  # fmt: skip
