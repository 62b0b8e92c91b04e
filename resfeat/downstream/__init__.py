"""What people do with a dataset.

`embedder.py` takes torch with it, and is imported where it runs.
"""

from resfeat.downstream.documents import (
    check_picture,
    check_place,
    write_document,
    write_picture,
)
from resfeat.downstream.duplicates import Group, duplicate_tiles, find_duplicates, write_groups
from resfeat.downstream.exact import Metric, Neighbours
from resfeat.downstream.index import Index, open_index, usable_index
from resfeat.downstream.indexing import Wanted, build_index
from resfeat.downstream.queries import Queries, queries_of
from resfeat.downstream.search import nearest
from resfeat.downstream.sheet import Tile, contact_page, contact_sheet, tiles

__all__ = [
    "Group", "Index", "Metric", "Neighbours", "Queries", "Tile", "Wanted", "build_index",
    "check_picture", "check_place", "contact_page", "contact_sheet", "duplicate_tiles",
    "find_duplicates", "nearest", "open_index", "queries_of", "tiles", "usable_index",
    "write_document", "write_groups", "write_picture",
]  # fmt: skip
