"""Reading Parquet, on a disk or in a store."""

from __future__ import annotations

import atexit
import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from resfeat.storage.fetch import Known, open_binary, stat
from resfeat.storage.location import Location
from resfeat.storage.remote import StorePath

# It is imported where it is used: it takes pandas with it, half a second.
if TYPE_CHECKING:
    import pyarrow.dataset as ds

LET_GO_SECONDS, GRACE_SECONDS = 2.0, 0.1


def open_parquet(
    source: Location | bytes, buffer_size: int = 0, version: Known | None = None
) -> pq.ParquetFile:
    """A Parquet file, of which only what is asked for is read.

    buffer_size: bytes of a column that are read at once; 0 reads all that a row group has of it.
    version: as of `open_binary`.

    Read it with use_threads=False, so that no thread of Arrow's has a part in it: one that lets go
    of bytes or a file of Python's while the interpreter ends aborts the process
    (apache/arrow#34314).
    """
    file = pa.BufferReader(source) if isinstance(source, bytes) else source
    if isinstance(source, StorePath):
        file = open_binary(source, version=version)
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer_size)


def dataset_of(folder: Location, names: Sequence[str] | None = None) -> ds.Dataset:
    """The Parquet files of a folder, all or those of these names, as a `pyarrow.dataset`."""
    import pyarrow.dataset as ds

    source = str(folder) if names is None else [str(folder / name) for name in names]
    system = None
    if isinstance(folder, StorePath):
        atexit.unregister(_let_go)  # once, however many there are
        atexit.register(_let_go)
        system = fs.PyFileSystem(_Objects())
    return ds.dataset(source, filesystem=system, format="parquet")


# Objects that are read by way of Arrow.
_OPENED = WeakSet[io.BufferedIOBase]()


def _let_go() -> None:
    """Wait for Arrow's threads to close what they have read, and to let go of the bytes, while
    Python is there for it: see `open_parquet`."""
    until = time.monotonic() + LET_GO_SECONDS
    while _OPENED and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(GRACE_SECONDS)  # of bytes nobody can tell


class _Objects(fs.FileSystemHandler):  # type: ignore[misc]
    """Objects as a file system of Arrow's, to be read. Paths are addresses."""

    def get_type_name(self) -> str:
        return "resfeat"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(StorePath.of(path)) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return [self._info(path) for path in StorePath.of(selector.base_dir).iterdir()]

    def _info(self, path: StorePath) -> fs.FileInfo:
        try:
            return fs.FileInfo(str(path), fs.FileType.File, size=stat(path)[0])
        except FileNotFoundError:
            kind = fs.FileType.Directory if path.is_dir() else fs.FileType.NotFound
            return fs.FileInfo(str(path), kind)

    def open_input_file(self, path: str) -> pa.PythonFile:
        file = open_binary(StorePath.of(path))
        _OPENED.add(file)
        return pa.PythonFile(file, mode="r")

    open_input_stream = open_input_file

    def _read_only(self, *_: Any) -> NoReturn:
        raise NotImplementedError("objects are only read by this way")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _read_only
    delete_file = move = copy_file = open_output_stream = open_append_stream = _read_only
