"""`Item`: one input image. `directory.py` and `prefix.py` make its id and label, by `rules.py`."""

from typing import Any, NamedTuple


class Item(NamedTuple):
    """One input image, as it was listed. A tuple, since a listing makes millions of them."""

    id: str  # unique in the dataset; of a file, its path relative to the source
    uri: str  # the file or object that holds its bytes, percent-encoded, so that any name survives
    size: int  # bytes
    mtime: int  # last modification, microseconds since 1970 in UTC; with the size, its version
    offset: int | None = None  # where it begins in a file of several images; None for a whole file
    label: str | None = None  # what `--label-from` makes of its place
    carried: tuple[Any, ...] = ()  # what it takes along unchanged: values of `Listing.carried`
