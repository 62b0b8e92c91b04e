"""The embeddings of one part, some rows at a time: as fast as its file can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.storage import Location, extents, open_parquet

Rows = tuple[pa.Array, NDArray[np.float32]]


def rows_in(part: Location, column: str, rows: int) -> Iterator[Rows]:
    """Ids and embeddings float32 [n, D] of a part, n at most `rows`, in its order. Both are of one
    version of the file, whoever replaces it meanwhile."""
    if isinstance(part, Path):
        with pa.OSFile(str(part)) as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                if stretches := _plain(raw, file, group, column):
                    ids = file.read_row_group(group, ["id"], use_threads=False)["id"]
                    vectors = _read(raw, file, column, stretches, rows)
                    yield from _beside(ids.combine_chunks(), vectors)
                else:
                    yield from _by_arrow(file, column, rows, [group])
    else:
        with open_parquet(part) as file:
            yield from _by_arrow(file, column, rows)


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
