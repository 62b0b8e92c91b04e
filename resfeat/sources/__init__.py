"""Where images come from: listing them, and reading one. A module for each kind of place."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from resfeat.errors import Failure, UsageError
from resfeat.sources import directory, prefix
from resfeat.sources.item import Item
from resfeat.sources.rules import printable
from resfeat.storage import is_remote, locate

__all__ = ["Content", "Item", "Listing", "gone", "item_of", "listing", "printable", "read"]

# The items of some sources, in a fixed order. Of either kind:
#   roots: the sources, in the order in which they are listed.
#   skipped: what the last iteration passed over, counted by kind.
#   carried: the columns of `Item.carried`.
Listing = directory.Directories | prefix.Prefixes
# An image's bytes, with the size (bytes) and the mtime (microseconds) that they had when read.
Content = tuple[bytes, int, int]


def listing(sources: Sequence[str], label_from: str | None = None) -> Listing:
    """A listing of directories on a disk, or of prefixes in a store.

    label_from: "parent" labels each image with the name of its folder.
    Raises UsageError where a source is missing, is a dataset, or lies within another, StoreError
    where the store is out of reach or does not let us look.
    """
    on_disk = [source for source in sources if not is_remote(source)]
    for source in on_disk:
        locate(source)  # raises UsageError for addresses of other kinds
    if not on_disk:
        return prefix.Prefixes(sources, label_from)
    if len(on_disk) < len(sources):
        raise UsageError("sources on a disk and in a store cannot be mixed: make two datasets")
    return directory.Directories(sources, label_from)


def read(item: Item) -> Content | Failure:
    """An image's bytes, and what they are now.

    Of a file that holds several images, its own bytes and the mtime of the file. Raises
    ResfeatError where the store that holds it is out of reach.
    """
    return prefix.read(item) if is_remote(item.uri) else directory.read(item)


def item_of(name: str) -> Item:
    """The image that a user names, by a path or a URI. Its size and mtime are not looked up."""
    is_uri = is_remote(name) or name.startswith("file://")
    return Item(name, name if is_uri else Path(name).absolute().as_uri(), size=0, mtime=0)


def gone(roots: Sequence[str], unread: Sequence[str]) -> str | None:
    """A source that is not there any more, or has nothing in it; None if all are there. unread:
    URIs of images that could not be read. A source among them is one image, and not gone."""
    single = {unquote_to_bytes(uri.removeprefix("file://")) for uri in unread}
    for root in roots:
        is_there = prefix.is_there if is_remote(root) else directory.is_there
        if os.fsencode(root) not in single and not is_there(root):
            return root
    return None
