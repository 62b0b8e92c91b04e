"""Images for people to look at, and the files that these go into."""

from resfeat.downstream.pictures.documents import (
    check_picture,
    check_place,
    write_document,
    write_picture,
)
from resfeat.downstream.pictures.sheet import Tile, contact_page, contact_sheet, tiles
from resfeat.downstream.pictures.thumbnails import thumbnails

__all__ = [
    "Tile", "check_picture", "check_place", "contact_page", "contact_sheet", "thumbnails", "tiles",
    "write_document", "write_picture",
]  # fmt: skip
