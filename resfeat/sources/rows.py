"""Images in Parquet and Arrow files, one a row: binary, or the struct {bytes, path} that `datasets`
writes, in which a path alone says where the image is.

Listing reads no image: what row groups say of themselves is enough. `cells` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from resfeat.errors import UsageError
from resfeat.sources.formats import PARQUET_BUFFER, ROWS, RowFile, is_parquet, open_arrow
from resfeat.storage import Location, open_parquet

BYTES, PATH = "bytes", "path"


class Leaf(NamedTuple):
    """What holds the images of a file: its column, and where in it the bytes and the paths are, as
    Parquet calls these."""

    column: str
    bytes: str
    path: str | None

    def bytes_in(self, batch: pa.RecordBatch) -> pa.Array:
        column = batch[self.column]
        return column if self.bytes == self.column else pc.struct_field(column, BYTES)

    def paths_in(self, batch: pa.RecordBatch) -> pa.Array:
        return pc.struct_field(batch[self.column], PATH)


@dataclass(frozen=True)
class Stretch:
    """Rows of a file that follow each other, from `first`. columns: what was asked for, by name.
    addresses: where the images are, if the rows do not hold them."""

    first: int
    count: int
    columns: dict[str, pa.Array]
    addresses: pa.Array | None = None


def leaf_of(file: RowFile, asked: str | None) -> Leaf | None:
    """Where a file has its images: in the column that is asked for, or in the only one that can
    hold some; None if none can. Raises UsageError where that is not clear."""
    if not file.is_columnar:
        return None
    if asked:
        file.check([asked], "image-column")
    fields = {field.name: field.type for field in file.schema}
    able = [asked] if asked else [name for name, kind in fields.items() if _holds(kind)]
    if not able:
        able = [name for name, kind in fields.items() if _is_list(kind) and _holds(kind.value_type)]
    if not able:
        return None
    if len(able) > 1:
        raise UsageError(
            f"{file.name} has several columns of bytes ({', '.join(able)}): say with "
            "--image-column which holds the images"
        )
    column, kind = able[0], fields[able[0]]
    if _is_list(kind):
        raise UsageError(
            f"{file.name}: column {column} has several images a row ({kind}): give each a row"
        )
    if not _holds(kind):
        raise UsageError(f"--image-column {column}: in {file.name} it is {kind}, and has no bytes")
    if not pa.types.is_struct(kind):
        return Leaf(column, column, None)
    has_path = kind.get_field_index(PATH) >= 0
    return Leaf(column, f"{column}.{BYTES}", f"{column}.{PATH}" if has_path else None)


def _holds(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index(BYTES)
        return place >= 0 and _holds(kind.field(place).type)
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    tests = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    return any(test(kind) for test in tests)


def stretches(file: RowFile, leaf: Leaf, columns: Sequence[str]) -> Iterator[Stretch]:
    """All rows of a file, with these columns and no image."""
    with file.told():
        parts = _of_parquet if is_parquet(file.location) else _of_arrow
        yield from parts(file.location, leaf, list(columns))


def _of_parquet(location: Location, leaf: Leaf, columns: list[str]) -> Iterator[Stretch]:
    with open_parquet(location, PARQUET_BUFFER) as file:
        groups, first = range(file.num_row_groups), 0
        place = _place(file, leaf.bytes)
        for is_empty, some in groupby(groups, lambda group: _is_empty(file, group, place)):
            alike = list(some)
            count = sum(file.metadata.row_group(group).num_rows for group in alike)
            paths = [leaf.path] if is_empty and leaf.path else []
            if not columns and not paths:
                yield from _bare(first, count)
                first += count
                continue
            wanted = [*columns, *paths]
            for batch in file.iter_batches(
                ROWS, row_groups=alike, columns=wanted, use_threads=False
            ):
                found = {name: batch[name] for name in columns}
                addresses = leaf.paths_in(batch) if paths else None
                yield Stretch(first, batch.num_rows, found, addresses)
                first += batch.num_rows


def _of_arrow(location: Location, leaf: Leaf, columns: list[str]) -> Iterator[Stretch]:
    first = 0
    with open_arrow(location) as (_, batches):
        for whole in batches:
            for start in range(0, whole.num_rows, ROWS):
                batch = whole.slice(start, ROWS)
                held = leaf.bytes_in(batch)
                is_empty = leaf.path and held.null_count == len(held)
                found = {name: batch[name] for name in columns}
                addresses = leaf.paths_in(batch) if is_empty else None
                yield Stretch(first, batch.num_rows, found, addresses)
                first += batch.num_rows


def _bare(first: int, count: int) -> Iterator[Stretch]:
    for start in range(0, count, ROWS):
        yield Stretch(first + start, min(ROWS, count - start), {})


def _place(file: Any, leaf: str) -> int:
    schema = file.schema
    return next(n for n in range(len(schema)) if schema.column(n).path == leaf)


def _is_empty(file: Any, group: int, column: int) -> bool:
    """Whether a row group says that it has nothing in a column."""
    about = file.metadata.row_group(group)
    counts = about.column(column).statistics
    return bool(counts and counts.has_null_count and counts.null_count == about.num_rows)
