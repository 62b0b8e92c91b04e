"""Reading Parquet, on a disk or in a store."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from resfeat.storage.location import Location
from resfeat.storage.remote import StoreFile, StorePath

# It is imported where it is used: it takes pandas with it, half a second.
if TYPE_CHECKING:
    import pyarrow.dataset as ds

READ_AHEAD = 1 << 20
"""Bytes asked of a store at once, so that columns that lie side by side are one request."""


def open_binary(location: Location) -> BinaryIO:
    """A file to read from, anywhere in it."""
    if isinstance(location, StorePath):
        return io.BufferedReader(StoreFile(location), READ_AHEAD)
    return location.open("rb")


def open_parquet(source: Location | bytes, buffer_size: int = 0) -> pq.ParquetFile:
    """A Parquet file, of which only what is asked for is read.

    buffer_size: bytes of a column that are read at once; 0 reads all that a row group has of it.

    Read it with use_threads=False, so that no thread of Arrow's has a part in it: one that lets go
    of bytes or a file of Python's while the interpreter ends aborts the process
    (apache/arrow#34314).
    """
    file = pa.BufferReader(source) if isinstance(source, bytes) else source
    if isinstance(source, StorePath):
        file = open_binary(source)
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer_size)


def dataset_of(folder: Location) -> ds.Dataset:
    """The Parquet files of a folder, as a `pyarrow.dataset`."""
    import pyarrow.dataset as ds

    if isinstance(folder, StorePath):
        return ds.dataset(str(folder.path), filesystem=folder.store, format="parquet")
    return ds.dataset(folder, format="parquet")
