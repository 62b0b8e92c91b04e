"""Reading the images that lie in rows of Parquet and Arrow files.

A row group of Parquet has no way in but its beginning, so its rows are read in order, a few at a
time: as many as have `BATCH_BYTES` by what the row group says of itself. What a broken page holds,
and what follows it in its row group, cannot be reached.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from resfeat.errors import Failure, first_line
from resfeat.sources.addresses import Addresses
from resfeat.sources.directory import path_of
from resfeat.sources.formats import PARQUET_BUFFER, is_parquet, open_arrow, version
from resfeat.sources.item import Content, Item
from resfeat.sources.rows import BYTES, PATH, Leaf
from resfeat.sources.rules import MAX_BYTES
from resfeat.storage import (
    ChangedError,
    Known,
    Location,
    RefusedError,
    is_remote,
    locate,
    open_parquet,
)

# Of images that are read together.
BATCH_ROWS, BATCH_BYTES = 32, 8 * 1024**2
CHANGED = "the file has changed since it was listed"

# What becomes of a row: an image, none, or, where it only says where its image is, that as an item.
Cell = Content | Failure | Item
# What a broken file raises: Arrow's own errors are of these.
_BROKEN = (OSError, ValueError, NotImplementedError, LookupError)
_Rows = Iterator[tuple[int, pa.RecordBatch]]


class _Changed(Exception):  # noqa: N818 (it is no error of anybody's)
    """Another file has taken the place of the one that was listed."""


def is_cell(item: Item) -> bool:
    return item.column is not None


def streamed(items: Sequence[Item]) -> Generator[Cell]:
    """What the rows of one file hold, in the order of the items. Raises ResfeatError where the
    store that has the file is out of reach."""
    falls = [
        n for n, (one, next_one) in enumerate(pairwise(items), 1) if _row(next_one) < _row(one)
    ]
    for start, end in pairwise([0, *falls, len(items)]):
        yield from _ascending(items[start:end])


def _ascending(items: Sequence[Item]) -> Iterator[Cell]:
    first, done = items[0], 0
    location = locate(first.uri if is_remote(first.uri) else path_of(first.uri))
    read = _of_parquet if is_parquet(location) else _of_arrow
    try:
        if isinstance(location, Path):  # of a store only the version that was listed is opened
            _check_same(location, first)
        for cell in read(location, items):
            yield cell
            done += 1
        return
    except (_Changed, ChangedError):
        failure = Failure("read", "bad_container", CHANGED)
    except FileNotFoundError:
        failure = Failure("read", "not_found", "the file that held it is gone")
    except (PermissionError, RefusedError) as error:
        failure = Failure("read", "permission", first_line(error))
    except _BROKEN as error:
        failure = _broken(error)
    yield from (failure for _ in items[done:])


def _broken(error: Exception) -> Failure:
    return Failure("read", "bad_container", first_line(error))


def _of_parquet(location: Location, items: Sequence[Item]) -> Iterator[Cell]:
    with open_parquet(location, PARQUET_BUFFER, _listed(items[0])) as file:
        about = file.metadata
        counts = (about.row_group(group).num_rows for group in range(about.num_row_groups))
        ends = list(accumulate(counts))
        for group, some in groupby(items, lambda item: bisect_right(ends, _row(item))):
            if group == len(ends):
                raise _Changed
            start = ends[group - 1] if group else 0
            yield from _of_group(location, file, group, start, list(some))


def _of_group(
    location: Location, file: Any, group: int, start: int, items: Sequence[Item]
) -> Iterator[Cell]:
    done, failure = 0, None
    leaf = _leaf(items[0], file.schema_arrow)
    wanted = [leaf.bytes, *([leaf.path] if leaf.path else [])]
    # Where that goes wrong, row by row as far as it goes.
    for rows in _batch_rows(file.metadata.row_group(group), leaf.bytes), 1:
        batches = file.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False)
        try:
            for cell in _cells(location, leaf, _counted(batches, start), items[done:]):
                yield cell
                done += 1
        except _BROKEN as error:
            failure = _broken(error)
        else:
            return
    yield from (failure for _ in items[done:] if failure)


def _batch_rows(group: Any, leaf: str) -> int:
    """How many rows of a row group are read at once."""
    columns = (group.column(n) for n in range(group.num_columns))
    size = next(each.total_uncompressed_size for each in columns if each.path_in_schema == leaf)
    fitting: int = BATCH_BYTES * group.num_rows // max(1, size)
    return max(1, min(BATCH_ROWS, fitting))


def _of_arrow(location: Location, items: Sequence[Item]) -> Iterator[Cell]:
    with open_arrow(location, _listed(items[0])) as (reader, batches):
        leaf = _leaf(items[0], reader.schema)
        yield from _cells(location, leaf, _counted(batches, 0), items)


def _leaf(item: Item, schema: pa.Schema) -> Leaf:
    """Where the bytes of an item and the others of its file are."""
    name = str(item.column)
    if name in schema.names:
        return Leaf(name, name, None)
    column = name.removesuffix(f".{BYTES}")
    has_path = schema.field(column).type.get_field_index(PATH) >= 0
    return Leaf(column, name, f"{column}.{PATH}" if has_path else None)


def _counted(batches: Iterable[pa.RecordBatch], start: int) -> _Rows:
    """Batches, each with the number of its first row."""
    for batch in batches:
        yield start, batch
        start += batch.num_rows


def _cells(location: Location, leaf: Leaf, batches: _Rows, items: Sequence[Item]) -> Iterator[Cell]:
    """What is in the rows of the items, which ascend."""
    left = deque(items)
    addresses = Addresses(str(location.parent))
    for start, batch in batches:
        if isinstance(location, Path):  # a store is asked for one version only
            _check_same(location, items[0])
        if left and _row(left[0]) < start + batch.num_rows:
            held = leaf.bytes_in(batch)
            paths = leaf.paths_in(batch) if leaf.path else pa.nulls(len(held), pa.string())
            while left and (row := _row(left[0]) - start) < batch.num_rows:
                yield _cell(left.popleft(), held[row], paths[row].as_py(), addresses)
        if not left:
            return
    raise _Changed


def _cell(item: Item, held: Any, path: str | None, addresses: Addresses) -> Cell:
    buffer = held.as_buffer() if held.is_valid else None
    if buffer is None and path:
        uri, problem = addresses.uri(path)
        return Item(item.id, uri, size=None, mtime=None, problem=problem)
    if not buffer:
        return Failure("read", "empty", "0 bytes" if held.is_valid else "no bytes, and no path")
    if len(buffer) > MAX_BYTES:
        return Failure("read", "too_large", f"{len(buffer):,} bytes; {MAX_BYTES:,} at most")
    return buffer.to_pybytes(), len(buffer), item.mtime


def _row(item: Item) -> int:
    return item.offset or 0


def _listed(item: Item) -> Known:
    return item.mtime, item.etag


def _check_same(location: Location, item: Item) -> None:
    if version(location) != _listed(item):
        raise _Changed
