"""Prefixes in an object store: list them in key order, and read an object from them.

The same tree on a disk and in a store gives the same ids in the same order. Keys stream by: what is
held is a few pages of them.
"""

import errno
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, repeat
from urllib.parse import quote_from_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from resfeat.errors import Failure, StoreError, UsageError, first_line
from resfeat.sources import rules
from resfeat.sources.item import Item, schema_of
from resfeat.sources.outputs import MARK, Outputs, Run
from resfeat.sources.rules import extent, folder_of, passed_over, printable
from resfeat.spec import SourceOptions
from resfeat.storage import (
    OBJECT,
    ChangedError,
    CredentialsError,
    MissingBucketError,
    RefusedError,
    StorePath,
    fetch,
    pages,
    stat,
)

# Parts of a key that no path has: two slashes leave an empty one.
UNUSABLE = ("", ".", "..")
TABLE = 8192
# A key with another character is percent-encoded in its URI, or may need `printable`.
_ODD = r"[^A-Za-z0-9_.~/-]"
_NO_SLASH = bytes(byte for byte in range(256) if byte != ord("/"))


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
        for bucket, roots in groupby(self.roots, lambda root: StorePath.of(root).root):
            objects = chain.from_iterable(map(self._objects, roots))
            yield from (self._items(bucket, some) for some in _gathered(objects))

    def _objects(self, root: str) -> Iterator[pa.RecordBatch]:
        """Those that may be images, as `storage.OBJECT`."""
        place = StorePath.of(root)
        if _is_object(place):
            columns = zip(OBJECT.names, (place.key, *stat(place)), strict=True)
            yield pa.record_batch({name: [value] for name, value in columns}, schema=OBJECT)
        else:
            yield from map(self._images, _joined(self._runs(place)))

    def _runs(self, place: StorePath) -> Iterator[Run]:
        """What lies below a prefix, without hidden folders and outputs."""
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
            for run in _by_folder(page.objects):
                if above := _hidden(run.folder, len(top)):
                    self.skipped["hidden"] += above != hidden
                    hidden = above
                    continue
                yield from outputs.take(run)
        yield from outputs.rest()

    def _images(self, objects: pa.RecordBatch) -> pa.RecordBatch:
        """The objects without what is passed over."""
        keys = objects["key"]
        likely = np.flatnonzero(pc.match_substring_regex(keys, rules.LIKELY_PASSED_OVER))
        if not len(likely):
            return objects
        names = (key[key.rfind("/") + 1 :] for key in keys.take(likely).to_pylist())
        why = list(map(passed_over, names))
        self.skipped.update(filter(None, why))
        kept = np.ones(len(keys), bool)
        kept[likely] = [each is None for each in why]
        return objects.filter(pa.array(kept))

    def _items(self, bucket: str, objects: pa.RecordBatch) -> pa.Table:
        """Whole columns at a time: a key then costs less than a microsecond."""
        keys, lead = objects["key"], f"{bucket}/"
        above, start = lead[len(self._base) :], max(0, len(self._base) - len(lead))
        own = {name: objects[name] for name in ("size", "mtime", "etag")}
        if pc.any(pc.match_substring_regex(keys, _ODD)).as_py():
            texts = keys.to_pylist()
            quoted = quote_from_bytes("\n".join(texts).encode(), safe="/\n").split("\n")
            own["id"] = pa.array([printable(above + key[start:]) for key in texts])
            own["uri"] = pa.array([lead + part for part in quoted])
        else:
            below = pc.utf8_slice_codeunits(keys, start)
            own["id"] = pc.binary_join_element_wise(above, below, "")
            own["uri"] = pc.binary_join_element_wise(lead, keys, "")
        if self._labelled:
            folders = _folders(keys).dictionary_encode()
            names = [folder_of(_path(lead) + folder) for folder in folders.dictionary.to_pylist()]
            own["label"] = pa.array(names).take(folders.indices)
        columns = [own.get(each.name, pa.nulls(len(keys), each.type)) for each in schema_of()]
        return pa.table(columns, schema_of())


def _by_folder(objects: pa.RecordBatch) -> Iterator[Run]:
    """The objects in runs, each of which lie in one folder."""
    keys = objects["key"]
    folders = pc.run_end_encode(_folders(keys))
    ends = np.asarray(folders.run_ends)
    starts = np.append(0, ends)[:-1]
    named = (each.to_pylist() for each in (folders.values, keys.take(starts), keys.take(ends - 1)))
    yield from map(Run, *named, repeat(objects), starts.tolist(), ends.tolist())


def _folders(keys: pa.Array) -> pa.Array:
    """The folder of each key, with its last slash."""
    return pc.ascii_rtrim(keys, characters=_NO_SLASH)


def _joined(runs: Iterable[Run]) -> Iterator[pa.RecordBatch]:
    """The objects of runs; runs that follow one another in a page together."""
    held = None
    for run in runs:
        if held and held.page is run.page and held.end == run.start:
            held = held._replace(end=run.end)
            continue
        if held:
            yield held.page.slice(held.start, held.end - held.start)
        held = run
    if held:
        yield held.page.slice(held.start, held.end - held.start)


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at least `TABLE`, but for the last one."""
    held, count = list[pa.RecordBatch](), 0
    for some in batches:
        held.append(some)
        count += len(some)
        if count >= TABLE:
            yield pa.concat_batches(held)
            held, count = [], 0
    if count:
        yield pa.concat_batches(held)


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
        parts = (key[start:].partition("/") for key in page.keys.to_pylist())
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
