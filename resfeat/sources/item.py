"""One input image."""

from typing import Any, NamedTuple


class Item(NamedTuple):
    """One input image, as it was listed. A tuple, since a listing makes millions of them.

    id: unique in the dataset; of a file, its path relative to the source.
    uri: the file or object that holds its bytes, percent-encoded, so that any name survives.
    size: bytes. mtime: last modification, microseconds since 1970 in UTC. Together, its version.
    offset: where its bytes begin in a file that holds several images; None for a whole file.
    label: what `--label-from` makes of its place.
    carried: values of `Listing.carried`, columns that travel with it unchanged.
    """

    id: str
    uri: str
    size: int
    mtime: int
    offset: int | None = None
    label: str | None = None
    carried: tuple[Any, ...] = ()
