"""Prefixes in an object store: list them in key order, and read an object from them.

The same tree on a disk and in a store gives the same ids in the same order. Keys stream by: what is
held is a few pages of them.
"""

import errno
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, repeat
from typing import Any
from urllib.parse import quote_from_bytes

import pyarrow as pa

from resfeat.errors import Failure, StoreError, UsageError, first_line
from resfeat.sources import rules
from resfeat.sources.item import Item, tables_of
from resfeat.sources.outputs import MARK, Outputs, Run
from resfeat.sources.rules import extent, folder_of, passed_over, printable
from resfeat.spec import SourceOptions
from resfeat.storage import (
    ChangedError,
    CredentialsError,
    MissingBucketError,
    Page,
    RefusedError,
    StorePath,
    fetch,
    pages,
    stat,
)

# Parts of a key that no path has: two slashes leave an empty one.
UNUSABLE = ("", ".", "..")
TABLE = 8192


def check(root: str) -> None:
    """Raise UsageError for a source that is not there, or is a dataset."""
    if not set(UNUSABLE).isdisjoint(_path(root).split("/")):
        raise UsageError(f"source {root} has an empty part, '.' or '..': leave it out")
    place = StorePath.of(root)
    if _is_object(place):
        return
    try:
        there = place.is_dir()
    except MissingBucketError:
        there = False
    if not there:
        raise UsageError(f"source {root} does not exist: check the address")
    if (place / MARK).is_dir():
        raise UsageError(f"source {root} is a resfeat dataset: name a prefix of images")


class Prefixes:
    """One or more prefixes (or single objects); see `listing.Part`."""

    carried = ()

    def __init__(self, roots: Sequence[str], base: str, options: SourceOptions) -> None:
        """roots: URIs, sorted by their components. base: what the ids leave out of them."""
        self._labelled, self._base = options.label_from == "parent", base
        self.roots, self.skipped = roots, Counter[str]()

    def tables(self) -> Iterator[pa.Table]:
        self.skipped.clear()
        return tables_of(chain.from_iterable(map(self._lists, self.roots)), TABLE)

    def _lists(self, root: str) -> Iterator[list[Item]]:
        place = StorePath.of(root)
        if _is_object(place):
            size, mtime, etag = stat(place)
            folder = f"{place.parent.key}/".lstrip("/")
            yield self._items(root, Run(folder, [place.key], [size], [mtime], [etag]))
            return
        top = f"{place.key}/".lstrip("/")
        outputs = Outputs(
            top,
            lambda folder: (StorePath.of(f"{place.root}/{folder}") / MARK).is_dir(),
            self.skipped,
        )
        hidden = None
        for page in pages(place):
            if page.unusable:
                self.skipped["unusable key"] += page.unusable
            for run in _runs(page):
                if above := _hidden(run.folder, len(top)):
                    self.skipped["hidden"] += above != hidden
                    hidden = above
                    continue
                for known in outputs.take(run):
                    yield self._items(root, self._images(known))
        for known in outputs.rest():
            yield self._items(root, self._images(known))

    def _images(self, run: Run) -> Run:
        """The run without what is passed over."""
        start = len(run.folder)
        names = [key[start:] for key in run.keys]
        if not rules.may_be_passed_over(names):
            return run
        why = list(map(passed_over, names))
        self.skipped.update(filter(None, why))
        kept = [n for n, kind in enumerate(why) if not kind]
        columns: Any = ([column[n] for n in kept] for column in run[1:])
        return Run(run.folder, *columns)

    def _items(self, root: str, run: Run) -> list[Item]:
        # Many at a time: an item is made in a microsecond or two.
        place = StorePath.of(root).root
        text, lead = "\n".join(run.keys), f"{place}/"
        above, start = lead[len(self._base) :], max(0, len(self._base) - len(lead))
        if text.isascii() and "\\" not in text:
            ids = [above + key[start:] for key in run.keys]
        else:
            ids = [printable(above + key[start:]) for key in run.keys]
        quoted = quote_from_bytes(text.encode(), safe="/\n")
        uris = [lead + key for key in (run.keys if quoted == text else quoted.split("\n"))]
        label = folder_of(_path(lead) + run.folder) if self._labelled else None
        rest = map(repeat, (None, None, label, None, (), 0))
        known = run.sizes, run.mtimes, run.etags
        return list(map(tuple.__new__, repeat(Item), zip(ids, uris, *known, *rest)))  # noqa: B905


def _runs(page: Page) -> Iterator[Run]:
    keys = page.keys
    folders = [key[: key.rfind("/") + 1] for key in keys]
    start = 0
    for folder, some in groupby(folders):
        end = start + len(list(some))
        columns: Any = (column[start:end] for column in page[:4])
        yield Run(folder, *columns)
        start = end


def _hidden(folder: str, top: int) -> str | None:
    """The first hidden folder on the way to one, below the first `top` characters."""
    if folder.startswith(".", top):
        at = top
    elif (at := folder.find("/.", max(0, top - 1)) + 1) == 0:
        return None
    return folder[: folder.index("/", at)]


def _path(address: str) -> str:
    return address.partition("://")[2]


def _is_object(place: StorePath) -> bool:
    if not place.key:
        return False
    try:
        stat(place)
    except FileNotFoundError:
        return False
    return True


def is_there(root: str) -> bool:
    return StorePath.of(root).exists()


def entries(folder: str) -> Iterator[tuple[str, bool]]:
    """The names of what lies right below a prefix, and whether each is one, too."""
    place = StorePath.of(folder)
    start = len(f"{place.key}/".lstrip("/"))
    for page in pages(place):
        parts = (key[start:].partition("/") for key in page.keys)
        for (name, slash), _ in groupby(parts, lambda part: part[:2]):
            yield name, bool(slash)


def names(folder: str) -> list[str]:
    """The names of what lies right below a prefix. Unlike `entries`, it asks for nothing deeper."""
    return [place.name for place in StorePath.of(folder).iterdir()]


def opened(uri: str) -> tuple[Callable[[int, int], bytes], int, int, str | None]:
    """How to read an object piece by piece, by start and length; its size, mtime and etag. Raises
    FileNotFoundError, and StoreError where the store is out of reach or does not let us. Reading
    raises OSError once another object has taken its place."""
    size, mtime, etag = stat(uri)

    def read(start: int, length: int) -> bytes:
        try:
            return fetch(uri, start, length, etag=etag).data
        except ChangedError as error:
            raise OSError(errno.ESTALE, first_line(error)) from error

    return read, size, mtime, etag


def read(item: Item) -> tuple[bytes, int, int] | Failure:
    """See `sources.read`. Raises StoreError where the whole store is out of reach."""
    start, length = item.offset, None if item.offset is None else item.size
    if start is not None and isinstance(why := extent(item, sys.maxsize), Failure):
        return why  # it is empty, or too large
    try:
        etag = item.etag if item.offset is not None else None
        most = rules.MAX_BYTES if start is None else None
        found = fetch(item.uri, start, length, etag=etag, most=most)
    except ChangedError as error:
        return Failure("read", "bad_container", first_line(error))
    except FileNotFoundError:
        return Failure("read", "not_found", "no such object")
    except StoreError as error:
        return failure(item.uri, error)
    if isinstance(where := extent(item, found.size), Failure):
        return where
    return found.data, len(found.data), found.mtime


def failure(uri: str, error: StoreError) -> Failure:
    """Of one object. Raises StoreError where it is the whole store that is out of reach, or does
    not know who we are."""
    if isinstance(error, CredentialsError):
        raise error
    if isinstance(error, RefusedError):
        return Failure("read", "permission", first_line(error))
    StorePath.of(uri).bucket.is_dir()  # is it this object, or the store?
    return Failure("read", "io_error", first_line(error))
