"""Where the values of a column lie in a Parquet file that holds them plain.

Arrow reads lists value by value, levels and all, into memory that is new each time. Embeddings are
neither compressed nor encoded and none is null, so the values of a page are its last bytes, and the
file's own bytes are the array. The layout is Parquet's: apache/parquet-format, `parquet.thrift`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Of a page's header, in which nothing but numbers is looked for.
HEADER_BYTES = 512
# By Thrift's compact protocol.
_TRUE, _FALSE, _BINARY, _STRUCT, _NUMBERS = 1, 2, 8, 12, (4, 5, 6)
# By Parquet.
_DATA_PAGE, _PLAIN = 0, 0


def extents(
    file: pa.NativeFile, chunk: pq.ColumnChunkMetaData, width: int
) -> list[tuple[int, int]] | None:
    """Offset and bytes of each stretch of a column chunk's values, which take `width` bytes each.
    None where they do not lie there plain; there must be no nulls among them."""
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
        return None
    at = chunk.data_page_offset
    end, found = at + chunk.total_compressed_size, list[tuple[int, int]]()
    while at < end:
        file.seek(at)
        head = iter(file.read(HEADER_BYTES))
        try:
            page = _struct(head)
            start = at + HEADER_BYTES - sum(1 for _ in head)
            kind, size, data = page[1], page[3], page[5]
            count, encoding = data[1], data[2]
            is_plain = (kind, encoding) == (_DATA_PAGE, _PLAIN) and 0 < count * width <= size
        except (KeyError, StopIteration, TypeError, ValueError):  # no such header, or a longer one
            return None
        if not is_plain:
            return None
        at = start + size
        found.append((at - count * width, count * width))
    is_whole = at == end and sum(size for _, size in found) == chunk.num_values * width
    return found if is_whole else None


def _struct(data: Iterator[int]) -> dict[int, Any]:
    """The numbers of a struct by field, and the structs in it. Raises ValueError for what a page's
    header does not have."""
    fields, field = dict[int, Any](), 0
    while byte := next(data):
        field = field + (byte >> 4) if byte >> 4 else _signed(_varint(data))
        kind = byte & 15
        if kind in _NUMBERS:
            fields[field] = _signed(_varint(data))
        elif kind == _STRUCT:
            fields[field] = _struct(data)
        elif kind == _BINARY:
            for _ in range(_varint(data)):
                next(data)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError(f"a field of kind {kind}")
    return fields


def _varint(data: Iterator[int]) -> int:
    value = shift = 0
    while True:
        byte = next(data)
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value


def _signed(value: int) -> int:
    """Undo the zigzag."""
    return (value >> 1) ^ -(value & 1)
