"""Which images are the same file, byte for byte: read again, since an embedding does not tell."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from resfeat.errors import Failure, ResfeatError
from resfeat.sources import Item, read_ahead

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

READ_BYTES, READ_IMAGES = 64 << 20, 64  # of files that are in memory together


@dataclass(frozen=True)
class Copies:
    """original: of each copy, by id, the first image that has the same bytes. unread: why an image
    that may be one, or have one, could not be read, by id."""

    original: dict[str, str]
    unread: dict[str, str]


def copies(dataset: Dataset, alike: Sequence[Sequence[str]]) -> Copies:
    """Read images that may be copies of each other, lists of their ids, wherever they lie."""
    wanted = [each for ids in alike for each in ids]
    items = dataset.items(wanted) if wanted else {}
    digests, unread = dict[str, bytes](), dict.fromkeys(wanted, "it is not listed any more")
    for name, found in _read(list(items.values())):
        if isinstance(found, str):
            unread[name] = found
        else:
            digests[name] = found
            del unread[name]
    original = {}
    for ids in alike:
        first: dict[bytes, str] = {}
        for each in ids:
            if each in digests and (known := first.setdefault(digests[each], each)) != each:
                original[each] = known
    return Copies(original, unread)


def _read(items: Sequence[Item]) -> Iterator[tuple[str, bytes | str]]:
    """The digest of each image's bytes, by id, or why it cannot be read."""
    lying = sorted(items, key=lambda item: (item.uri, item.offset or 0))
    for _, there in itertools.groupby(lying, lambda item: urlsplit(item.uri)[:2]):
        left = list(there)
        try:
            while left:
                some = left[: _fitting(left)]
                for item, content in zip(some, read_ahead(some, len(some)), strict=True):
                    if isinstance(content, Failure):
                        yield item.id, f"{content.reason}, {content.message}"
                    else:
                        yield item.id, hashlib.sha256(content[0]).digest()
                left = left[len(some) :]
        except ResfeatError as error:  # a store is out of reach: the others may be read
            yield from ((item.id, str(error)) for item in left)


def _fitting(items: Sequence[Item]) -> int:
    """How many of these items, at least one, are read together."""
    sizes = itertools.accumulate(item.size or 0 for item in items[:READ_IMAGES])
    return max(1, sum(size <= READ_BYTES for size in sizes))
