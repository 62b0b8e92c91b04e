"""What a dataset is, as one page to send to somebody."""

from resfeat.downstream.page.map import Kind
from resfeat.downstream.page.page import page

__all__ = ["Kind", "page"]
