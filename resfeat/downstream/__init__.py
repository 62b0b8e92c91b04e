"""What people do with a dataset."""

from resfeat.downstream.duplicates import Group, find_duplicates, write_document, write_groups
from resfeat.downstream.duplicates_page import duplicates_page
from resfeat.downstream.duplicates_page import shown as shown_on_page
from resfeat.downstream.index import Index, open_index, usable_index
from resfeat.downstream.indexing import Wanted, build_index
from resfeat.downstream.search import Neighbour, embed_queries, search
from resfeat.downstream.sheet import contact_sheet

__all__ = [
    "Group", "Index", "Neighbour", "Wanted", "build_index", "contact_sheet",
    "duplicates_page", "embed_queries", "find_duplicates", "open_index", "search", "shown_on_page",
    "usable_index", "write_document", "write_groups",
]  # fmt: skip
