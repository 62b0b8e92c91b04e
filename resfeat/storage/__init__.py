"""Files on a disk or in an object store: paths, drafts that appear whole, and reading Parquet."""

from resfeat.errors import public
from resfeat.storage.clouds import (
    SCHEMES,
    ChangedError,
    CredentialsError,
    MissingBucketError,
    RefusedError,
    is_remote,
)
from resfeat.storage.draft import Draft, Drafts, draft, sha256, write_json, write_whole
from resfeat.storage.extents import extents
from resfeat.storage.fence import Fence
from resfeat.storage.fetch import Fetched, Known, fetch, open_binary, stat
from resfeat.storage.listing import pages
from resfeat.storage.location import (
    Location,
    file_system_of,
    locate,
    make_folder,
    remove,
    remove_all,
)
from resfeat.storage.parquet import dataset_of, open_parquet
from resfeat.storage.raw import OBJECT, Page
from resfeat.storage.remote import StorePath, Version

__all__ = [
    "OBJECT", "SCHEMES", "ChangedError", "CredentialsError", "Draft", "Drafts", "Fence", "Fetched",
    "Known", "Location", "MissingBucketError", "Page", "RefusedError", "StorePath", "Version",
    "dataset_of", "draft", "extents", "fetch", "file_system_of", "is_remote", "locate",
    "make_folder", "open_binary", "open_parquet", "pages", "public", "remove",
    "remove_all", "sha256", "stat", "write_json", "write_whole",
]  # fmt: skip
