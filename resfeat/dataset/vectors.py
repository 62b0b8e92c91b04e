"""The embeddings of one part, as fast as its file can be read: all, some rows at a time, or just
those of some rows.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.storage import Location, extents, open_parquet

Rows = tuple[pa.Array, NDArray[np.float32]]


def rows_in(part: Location, column: str, rows: int) -> Iterator[Rows]:
    """Ids and embeddings float32 [n, D] of a part, n at most `rows`, in its order. Both are of one
    version of the file, whoever replaces it meanwhile."""
    with _opened(part) as (raw, file):
        if raw is None:
            yield from _by_arrow(file, column, rows)
            return
        for group in range(file.num_row_groups):
            if stretches := _plain(raw, file, group, column):
                ids = file.read_row_group(group, ["id"], use_threads=False)["id"]
                vectors = _read(raw, file, column, stretches, rows)
                yield from _beside(ids.combine_chunks(), vectors)
            else:
                yield from _by_arrow(file, column, rows, [group])


def rows_of(part: Location, column: str, ids: pa.Array) -> Rows:
    """The same of those of these images that the part has. On a disk little else is read."""
    with _opened(part) as (raw, file):
        there = file.read(["id"], use_threads=False)["id"].combine_chunks()
        places = pc.indices_nonzero(pc.is_in(there, ids))
        return there.take(places), _picked(raw, file, column, places.to_numpy().astype(np.int64))


def vectors_at(part: Location, column: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The embeddings float32 [n, D] of these rows of a part, which ascend; none for those that are
    behind its last one."""
    with _opened(part) as (raw, file):
        return _picked(raw, file, column, rows)


@contextmanager
def _opened(part: Location) -> Iterator[tuple[pa.NativeFile | None, pq.ParquetFile]]:
    """A part, and its bytes if they lie on a disk."""
    if isinstance(part, Path):
        with pa.OSFile(str(part)) as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
            yield raw, file
    else:
        with open_parquet(part) as file:
            yield None, file


def _picked(
    raw: pa.NativeFile | None, file: pq.ParquetFile, column: str, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    length, kind = _type(file, column)
    found, start = [np.empty((0, length), kind)], 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        some = rows[slice(*np.searchsorted(rows, [start, end]))] - start
        start = end
        if not len(some):
            continue
        if raw and (stretches := _plain(raw, file, group, column)):
            found.append(_pick(raw, stretches, some, np.empty((len(some), length), kind)))
        else:
            table = file.read_row_group(group, [column], use_threads=False).take(some)
            flat = table[column].combine_chunks().flatten().to_numpy()
            found.append(flat.reshape(len(some), length))
    return np.concatenate(found).astype(np.float32, copy=False)


def _by_arrow(
    file: pq.ParquetFile, column: str, rows: int, groups: Sequence[int] | None = None
) -> Iterator[Rows]:
    batches = file.iter_batches(rows, groups, columns=["id", column], use_threads=False)
    for batch in batches:
        flat = batch[column].flatten().to_numpy().astype(np.float32, copy=False)
        yield batch["id"], flat.reshape(batch.num_rows, -1)


def _plain(
    raw: pa.NativeFile, file: pq.ParquetFile, group: int, column: str
) -> list[tuple[int, int]] | None:
    about = file.metadata.row_group(group)
    width = _type(file, column)[1].itemsize
    for n in range(about.num_columns):
        chunk = about.column(n)
        if chunk.path_in_schema.split(".")[0] == column:
            return extents(raw, chunk, width)
    return None


def _type(file: pq.ParquetFile, column: str) -> tuple[int, np.dtype[np.floating]]:
    """Length and numbers of a column's lists."""
    kind = file.schema_arrow.field(column).type
    return kind.list_size, np.dtype(kind.value_type.to_pandas_dtype())


def _pick(
    raw: pa.NativeFile,
    stretches: Sequence[tuple[int, int]],
    rows: NDArray[np.int64],
    into: NDArray[np.floating],
) -> NDArray[np.floating]:
    """The file's own bytes of these rows."""
    ends = list(accumulate(size for _, size in stretches))
    for row, vector in zip(rows.tolist(), into, strict=True):
        at, room = row * vector.nbytes, vector.view(np.uint8).data
        while room:
            offset, size = stretches[n := bisect(ends, at)]
            left = ends[n] - at
            taken = min(left, len(room))
            raw.seek(offset + size - left)
            if raw.readinto(room[:taken]) != taken:
                raise pa.ArrowInvalid("it ends too early")
            at, room = at + taken, room[taken:]
    return into


def _read(
    raw: pa.NativeFile,
    file: pq.ParquetFile,
    column: str,
    stretches: Sequence[tuple[int, int]],
    rows: int,
) -> Iterator[NDArray[np.float32]]:
    """The file's own bytes, put one behind the other: a page may end within a row."""
    length, kind = _type(file, column)
    left = sum(size for _, size in stretches) // (length * kind.itemsize)
    waiting = list(stretches[::-1])
    while left:
        block = np.empty((min(rows, left), length), kind)
        left -= len(block)
        room = block.reshape(-1).view(np.uint8).data
        while room:
            offset, size = waiting.pop()
            taken = min(size, len(room))
            raw.seek(offset)
            if raw.readinto(room[:taken]) != taken:
                raise pa.ArrowInvalid("it ends too early")
            room = room[taken:]
            if taken < size:
                waiting.append((offset + taken, size - taken))
        yield block.astype(np.float32, copy=False)


def _beside(ids: pa.Array, vectors: Iterator[NDArray[np.float32]]) -> Iterator[Rows]:
    start = 0
    for block in vectors:
        yield ids.slice(start, len(block)), block
        start += len(block)
