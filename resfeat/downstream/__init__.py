"""What people do with a dataset.

`embedder.py` takes torch with it, and is imported where it runs.
"""

from resfeat.downstream.exact import Metric, Neighbours
from resfeat.downstream.queries import Queries, queries_of
from resfeat.downstream.search import nearest
from resfeat.downstream.sheet import Tile, contact_page, contact_sheet, tiles

__all__ = [
    "Metric", "Neighbours", "Queries", "Tile", "contact_page", "contact_sheet", "nearest",
    "queries_of", "tiles",
]  # fmt: skip
