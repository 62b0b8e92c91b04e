"""Prefixes in an object store: list them in key order, and read an object from them.

The same tree on a disk and in a store gives the same ids in the same order. Keys stream by: what is
held is a few pages of them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, repeat
from typing import Any
from urllib.parse import quote_from_bytes

from resfeat.errors import Failure, StoreError, UsageError, first_line
from resfeat.sources import rules
from resfeat.sources.item import Item
from resfeat.sources.outputs import MARK, Outputs, Run
from resfeat.sources.rules import base_of, check_apart, extent, folder_of, passed_over, printable
from resfeat.storage import MissingBucketError, Page, RefusedError, StorePath, fetch, pages, stat

# Parts of a key that no path has: two slashes leave an empty one.
UNUSABLE = ("", ".", "..")


class Prefixes:
    """A listing of one or more prefixes (or single objects); see `sources.listing`."""

    carried = ()

    def __init__(self, sources: Sequence[str], label_from: str | None = None) -> None:
        self._labelled = label_from == "parent"
        paths = {_path(source.rstrip("/")): source.rstrip("/") for source in sources}
        self._paths = sorted(paths, key=lambda path: path.split("/"))
        self.roots = [paths[path] for path in self._paths]
        self.skipped: Counter[str] = Counter()
        for path, root in zip(self._paths, self.roots, strict=True):
            if not set(UNUSABLE).isdisjoint(path.split("/")):
                raise UsageError(f"source {root} has an empty part, '.' or '..': leave it out")
            place = StorePath.of(root)
            if not (is_object := _is_object(place)):
                _check(root, place)
        check_apart(self._paths)
        self._base = base_of(self._paths, is_folder=not is_object)

    def __iter__(self) -> Iterator[Item]:
        self.skipped.clear()
        return chain.from_iterable(chain.from_iterable(map(self._lists, self.roots)))

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
        place, path = StorePath.of(root).root, _path(root)
        bucket = path.partition("/")[0]
        text = "\n".join(run.keys)
        start = len(self._base) - len(bucket) - 1
        if text.isascii() and "\\" not in text:
            ids = [key[start:] for key in run.keys]
        else:
            ids = [printable(key[start:]) for key in run.keys]
        quoted = quote_from_bytes(text.encode(), safe="/\n")
        uris = [f"{place}/{key}" for key in (run.keys if quoted == text else quoted.split("\n"))]
        label = folder_of(f"{bucket}/{run.folder}") if self._labelled else None
        etags = run.etags  # noqa: F841
        rest = map(repeat, (None, label, ()))
        return list(map(tuple.__new__, repeat(Item), zip(ids, uris, run.sizes, run.mtimes, *rest)))  # noqa: B905


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


def _check(root: str, place: StorePath) -> None:
    """Raise UsageError where there is no such prefix, or it is a dataset."""
    try:
        is_there = place.is_dir()
    except MissingBucketError:
        is_there = False
    if not is_there:
        raise UsageError(f"source {root} does not exist: check the address")
    if (place / MARK).is_dir():
        raise UsageError(f"source {root} is a resfeat dataset: name a prefix of images")


def is_there(root: str) -> bool:
    return StorePath.of(root).exists()


def read(item: Item) -> tuple[bytes, int, int] | Failure:
    """See `sources.read`. Raises StoreError where the whole store is out of reach."""
    start, length = item.offset, None if item.offset is None else item.size
    try:
        if length == 0:
            return Failure("read", "empty", "0 bytes")
        found = fetch(item.uri, start, length, most=rules.MAX_BYTES if start is None else None)
    except FileNotFoundError:
        return Failure("read", "not_found", "no such object")
    except RefusedError as error:
        return Failure("read", "permission", first_line(error))
    except StoreError as error:
        StorePath.of(item.uri).bucket.is_dir()  # is it this object, or the store?
        return Failure("read", "io_error", first_line(error))
    if isinstance(where := extent(item, found.size), Failure):
        return where
    return found.data, len(found.data), found.mtime
