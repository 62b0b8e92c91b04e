"""Which images are the same file, byte for byte: read again, since an embedding does not tell."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from resfeat.errors import Failure, ResfeatError
from resfeat.sources import Content, Item, Run, runs

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

# Runs of images that are read at a time, and are in memory together: each may wait for a store.
AT_ONCE = 8
TOGETHER = 8192  # images: told of at a time, and looked at for what lies side by side


@dataclass(frozen=True)
class Copies:
    """original: of each copy, by id, the first image that has the same bytes. unread: why an image
    that may be one, or have one, could not be read, by id."""

    original: dict[str, str]
    unread: dict[str, str]


def copies(
    dataset: Dataset, alike: Sequence[tuple[int, Sequence[str]]], tell: Callable[[str], None]
) -> Copies:
    """Read images that may be copies of each other, wherever they lie: their size, bytes, and the
    list of their ids."""
    sizes = {each: size for size, ids in alike for each in ids}
    listed = dataset.items(list(sizes)).values() if sizes else ()
    # A table does not list how large its images are, and so many as are small may be read together.
    items = [item._replace(size=sizes[item.id]) if item.size is None else item for item in listed]
    digests, unread = dict[str, bytes](), dict.fromkeys(sizes, "it is not listed any more")
    for count, (name, found) in enumerate(_read(items)):
        if count % TOGETHER == 0:
            tell(f"reading images that may be copies of a file: {count:,} of {len(items):,}")
        if isinstance(found, str):
            unread[name] = found
        else:
            digests[name] = found
            del unread[name]
    original = {}
    for _, ids in alike:
        first: dict[bytes, str] = {}
        for each in ids:
            if each in digests and (known := first.setdefault(digests[each], each)) != each:
                original[each] = known
    return Copies(original, unread)


def _read(items: Sequence[Item]) -> Iterator[tuple[str, bytes | str]]:
    """The digest of each image's bytes, by id, or why it cannot be read."""
    lying = sorted(items, key=lambda item: (item.uri, item.offset or 0))
    for _, there in itertools.groupby(lying, lambda item: urlsplit(item.uri)[:2]):
        some = list(there)
        left = dict.fromkeys(item.id for item in some)
        try:
            for item, content in _contents(some):
                del left[item.id]
                if isinstance(content, Failure):
                    yield item.id, f"{content.reason}, {content.message}"
                else:
                    yield item.id, hashlib.sha256(content[0]).digest()
        except ResfeatError as error:  # a store is out of reach: the others may be read
            yield from ((name, str(error)) for name in left)


def _contents(items: Sequence[Item]) -> Iterator[tuple[Item, Content | Failure]]:
    """What each of the items is now. A file that can only be read in order is read once."""
    with ThreadPoolExecutor(AT_ONCE, "copies") as pool:
        under_way = deque[tuple[Run, Future[list[Content | Failure]]]]()
        for run in runs(items, range(len(items)), TOGETHER):
            under_way.append((run, pool.submit(run.read)))
            if len(under_way) == AT_ONCE:
                run, contents = under_way.popleft()
                yield from zip(run.items, contents.result(), strict=True)
        for run, contents in under_way:
            yield from zip(run.items, contents.result(), strict=True)
