"""Reading Parquet, on a disk or in a store."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from resfeat.storage.location import Location
from resfeat.storage.remote import StoreFile, StorePath

READ_AHEAD = 1 << 20
"""Bytes asked of a store at once, so that columns that lie side by side are one request."""


def open_parquet(source: Location | bytes) -> pq.ParquetFile:
    """A Parquet file, of which only what is asked for is read.

    Read it with use_threads=False, so that no thread of Arrow's has a part in it: one that lets go
    of bytes or a file of Python's while the interpreter ends aborts the process
    (apache/arrow#34314).
    """
    file: Path | io.BufferedReader | pa.BufferReader
    if isinstance(source, bytes):
        file = pa.BufferReader(source)
    elif isinstance(source, StorePath):
        file = io.BufferedReader(StoreFile(source), READ_AHEAD)
    else:
        file = source
    return pq.ParquetFile(file, pre_buffer=False)


def dataset_of(location: Location) -> tuple[str, fs.FileSystem | None]:
    """A folder as `pyarrow.dataset.dataset` takes it: its path, and the file system of that."""
    if isinstance(location, Path):
        return str(location), None
    return str(location.path), location.store
