"""Where images come from: listing them, and reading them. A module for each kind of place."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from resfeat.sources import places
from resfeat.sources.directory import path_of
from resfeat.sources.item import (
    CARRIED,
    Content,
    Item,
    carried_in,
    items_of,
    schema_of,
    stays_whole,
    table_of,
)
from resfeat.sources.listing import Listing, listing
from resfeat.sources.places import container_of, is_there
from resfeat.sources.reading import RUN_IMAGES, Run, is_local, read, read_ahead, runs
from resfeat.sources.rules import printable
from resfeat.storage import is_remote

__all__ = [
    "CARRIED", "RUN_IMAGES", "Content", "Item", "Listing", "Run", "carried_in", "container_of",
    "gone", "is_local", "is_there", "item_of", "items_of", "listing", "path_of", "printable",
    "read", "read_ahead", "runs", "schema_of", "stays_whole", "table_of",
]  # fmt: skip


def item_of(name: str) -> Item:
    """The image that a user names, by a path or a URI. Its size and mtime are not looked up."""
    is_uri = is_remote(name) or name.startswith("file://")
    uri = name if is_uri else Path(name).absolute().as_uri()
    return Item(name, uri, size=None, mtime=None)


def gone(roots: Sequence[str], unread: Sequence[str]) -> str | None:
    """A source that is not there any more, or has nothing in it; None if all are there. unread:
    URIs of images that could not be read. A source among them is one image, and not gone."""
    single = {unquote_to_bytes(uri.removeprefix("file://")) for uri in unread}
    for root in roots:
        is_unread, kind = os.fsencode(root) in single, places.container_of(root)
        if kind == "table" and not is_unread:
            continue  # one of addresses is needed for the listing alone
        if not (is_unread and not kind) and not is_there(root):
            return root
    return None
