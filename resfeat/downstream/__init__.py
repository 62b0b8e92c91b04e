"""What people do with a dataset.

`embedder.py` takes torch with it, and is imported where it runs.
"""

from resfeat.downstream.duplicates import Group, duplicate_tiles, find_duplicates, write_groups
from resfeat.downstream.index import Index, Wanted, build_index, open_index, usable_index
from resfeat.downstream.pictures import (
    Tile,
    check_picture,
    check_place,
    contact_page,
    contact_sheet,
    tiles,
    write_document,
    write_picture,
)
from resfeat.downstream.search import Metric, Neighbours, Queries, nearest, queries_of

__all__ = [
    "Group", "Index", "Metric", "Neighbours", "Queries", "Tile", "Wanted", "build_index",
    "check_picture", "check_place", "contact_page", "contact_sheet", "duplicate_tiles",
    "find_duplicates", "nearest", "open_index", "queries_of", "tiles", "usable_index",
    "write_document", "write_groups", "write_picture",
]  # fmt: skip
