"""Exact search: the nearest of all images, and what they are searched by."""

from resfeat.downstream.search.exact import Metric, Neighbours, rank
from resfeat.downstream.search.queries import Queries, queries_of
from resfeat.downstream.search.search import check_k, check_vectors, nearest

__all__ = [
    "Metric", "Neighbours", "Queries", "check_k", "check_vectors", "nearest", "queries_of", "rank",
]  # fmt: skip
