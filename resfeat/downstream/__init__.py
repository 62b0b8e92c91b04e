"""What people do with a dataset."""

from resfeat.downstream.search import Neighbour, embed_queries, search
from resfeat.downstream.sheet import contact_sheet

__all__ = ["Neighbour", "contact_sheet", "embed_queries", "search"]
