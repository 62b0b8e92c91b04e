"""Files on a disk or in an object store, behind the part of pathlib's interface that we need.

A local path is a `pathlib.Path`, an object is a `StorePath`; code that takes a `Location` takes
either. Objects are read and written through pyarrow.fs. Every request has a time limit and is
repeated with growing pauses, and a whole operation is repeated where that did not help, so that
what is raised in the end means that the store is out of reach, or says no.

Visible whole or not at all: a `Draft` is where a file is written before it is published, in a
hidden folder on a disk and in memory for a store. Publishing is an atomic rename or one PUT.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from resfeat.errors import ResfeatError, UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SCHEME = "s3://"
# With one slash: what a Path makes of an address.
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|(s3|gs|https?):/")
CONNECT_SECONDS = 5
REQUEST_SECONDS = 10  # without a byte
# By the AWS library, of each request. Its attempts come out of one budget for all requests, which a
# store in trouble soon uses up, so whole operations are tried again as well, with a new budget.
REQUEST_ATTEMPTS = 3
ATTEMPTS = 4
# What no other attempt can change.
REFUSALS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
MISSING = "NO_SUCH_BUCKET"

T = TypeVar("T")


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether this names something in an object store."""
    return str(name).startswith(SCHEME)


def locate(name: str | os.PathLike[str]) -> Location:
    """The file or folder of this name: an absolute path, or an object of an s3:// address.

    Raises UsageError for any other address, which a path would make a local folder of.
    """
    if not is_remote(name):
        if ADDRESS.match(str(name)):
            raise UsageError(f"'{name}' is no address that we know: give {SCHEME}BUCKET/PREFIX")
        return Path(name).absolute()
    path = PurePosixPath(str(name).removeprefix(SCHEME))
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UsageError(f"'{name}' is no address of an object: give {SCHEME}BUCKET/PREFIX")
    return StorePath(path)


@lru_cache
def store(bucket: str) -> fs.S3FileSystem:
    """The object store that holds a bucket. Endpoint, region and credentials are those of the usual
    AWS_* variables and files."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region or None,
        endpoint_override=endpoint or None,
        allow_delayed_open=True,  # one PUT for what is small
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=REQUEST_ATTEMPTS),
    )


class StoreError(ResfeatError, OSError):
    """A store is out of reach, or refuses."""


def patiently(what: object, operation: Callable[[], T]) -> T:
    """What an operation on `what` gives, tried again a few times where the store had trouble.

    Raises FileNotFoundError where there is nothing, and StoreError for all else.
    """
    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5, max=10),
        retry=retry_if_exception(_is_passing),
        before_sleep=lambda state: store.cache_clear(),
        reraise=True,
    )
    try:
        return attempts(operation)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = str(error).partition("\n")[0][:300]
        raise StoreError(
            f"{what}: {reason}; check the address, the AWS_* variables and the network, and give "
            "the same command again"
        ) from error


def is_refused(error: BaseException) -> bool:
    """Whether the store does not let us, which no other attempt can change."""
    return any(refusal in str(error) for refusal in REFUSALS)


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may end otherwise."""
    return (
        isinstance(error, OSError)
        and not isinstance(error, FileNotFoundError)
        and not is_refused(error)
        and MISSING not in str(error)
    )


@dataclass(frozen=True)
class StorePath:
    """An object, or what its name begins with: bucket and key. Folders are not made there."""

    path: PurePosixPath

    def __str__(self) -> str:
        return SCHEME + str(self.path)

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self.path / name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> StorePath:
        return StorePath(self.path.parent)

    @property
    def store(self) -> fs.S3FileSystem:
        return store(self.path.parts[0])

    def with_suffix(self, suffix: str) -> StorePath:
        return StorePath(self.path.with_suffix(suffix))

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return bool(self._info().type != fs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self._info().type == fs.FileType.Directory)

    def read_bytes(self) -> bytes:
        def read() -> bytes:
            with self.store.open_input_file(str(self.path)) as file:
                content: bytes = file.read()
                if len(content) != file.size():
                    raise OSError(f"{self}: {len(content):,} of {file.size():,} bytes came")
                return content

        return patiently(self, read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes | pa.Buffer) -> None:
        """One PUT. Whoever reads meanwhile sees what was there before."""

        def write() -> None:
            file = self.store.open_output_stream(str(self.path))
            # In one piece: an upload that fails half way then never becomes an object.
            file.write(content)
            file.close()

        patiently(self, write)

    def iterdir(self) -> Iterator[StorePath]:
        """The objects and prefixes right below this one."""
        selector = fs.FileSelector(str(self.path), allow_not_found=True)
        for info in patiently(self, lambda: self.store.get_file_info(selector)):
            if (path := PurePosixPath(info.path)) != self.path:  # as a marker of it would be
                yield StorePath(path)

    def unlink(self, missing_ok: bool = False) -> None:
        def delete() -> None:
            nonlocal missing_ok
            try:
                self.store.delete_file(str(self.path))
            except FileNotFoundError:
                if not missing_ok:
                    raise
            except OSError:
                missing_ok = True  # as it is where only the answer was lost
                raise

        patiently(self, delete)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there as soon as an object has it."""

    def rmdir(self) -> None:
        """Nothing, for the same reason."""

    def remove_all(self) -> None:
        """Remove every object below this one."""
        with suppress(FileNotFoundError):
            patiently(self, lambda: self.store.delete_dir(str(self.path)))

    def _info(self) -> fs.FileInfo:
        return patiently(self, lambda: self.store.get_file_info(str(self.path)))


Location = Path | StorePath


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
        file = io.BufferedReader(_StoreFile(source), READ_AHEAD)
    else:
        file = source
    return pq.ParquetFile(file, pre_buffer=False)


class _StoreFile(io.RawIOBase):
    """An object as a file of which each piece is read patiently."""

    def __init__(self, location: StorePath) -> None:
        self._location = location
        self._at = 0
        self._file: pa.NativeFile | None = None
        self._size: int = patiently(location, lambda: self._open().size())

    def _open(self) -> pa.NativeFile:
        if self._file is None:
            self._file = self._location.store.open_input_file(str(self._location.path))
        return self._file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        with memoryview(buffer) as view:
            wanted = min(len(view), max(0, self._size - self._at))

            def piece() -> bytes:
                try:
                    content: bytes = self._open().read_at(wanted, self._at)
                    if len(content) != wanted:
                        raise OSError(f"{len(content):,} of {wanted:,} bytes came")
                    return content
                except OSError:
                    self._drop()
                    raise

            view[:wanted] = patiently(self._location, piece)
        self._at += wanted
        return wanted

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def dataset_of(location: Location) -> tuple[str, fs.FileSystem | None]:
    """A folder as `pyarrow.dataset.dataset` takes it: its path, and the file system of that."""
    if isinstance(location, Path):
        return str(location), None
    return str(location.path), location.store


def remove_all(location: Location) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if isinstance(location, Path):
        shutil.rmtree(location, ignore_errors=True)
    else:
        location.remove_all()


def write_whole(folder: Path | None, location: Location, content: bytes) -> None:
    """Write a small file by way of a draft in `folder`."""
    document = draft(folder, location.name)
    try:
        document.write(content)
        document.publish(location)
    finally:
        document.discard()


def make_folder(location: Location) -> None:
    """Make a folder, durably, if it is not there."""
    if isinstance(location, Path) and not location.exists():
        location.mkdir(exist_ok=True)
        _sync(location.parent)


def remove(location: Location) -> None:
    """Remove a file, durably, if it is there."""
    location.unlink(missing_ok=True)
    if isinstance(location, Path) and location.parent.exists():
        _sync(location.parent)


def rename(location: Location, target: Location) -> None:
    """Give a file another name, durably. In a store it is copied first, and then removed."""
    if isinstance(location, StorePath) or isinstance(target, StorePath):
        target.write_bytes(location.read_bytes())
        location.unlink()
        return
    os.replace(location, target)
    for parent in {target.parent, location.parent}:
        _sync(parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Draft(Protocol):
    """A file that is being written, seen by nobody until it is published."""

    @property
    def sink(self) -> Path | pa.BufferOutputStream:
        """What to write to, until `reopen` is called."""
        ...

    def write(self, content: bytes) -> None:
        """Write all of it at once."""
        ...

    def reopen(self) -> pa.NativeFile:
        """What was written, whole."""
        ...

    def publish(self, target: Any) -> None:
        """Put the file in its place, so that it survives a power cut."""
        ...

    def discard(self) -> None:
        """Forget it, unless it was published."""
        ...


def draft(folder: Path | None, name: str) -> Draft:
    """A new draft: in a folder on the file system of its target, or, for a store, in memory."""
    return _StoreDraft() if folder is None else _DiskDraft(folder, name)


def sha256(draft: Draft) -> str:
    """Digest of a draft that is whole, 64 hex digits."""
    with draft.reopen() as file:
        return hashlib.sha256(file.read_buffer()).hexdigest()


class _DiskDraft:
    def __init__(self, folder: Path, name: str) -> None:
        # Unique, so that a worker thought dead and its successor never write to one file.
        self.sink = folder / f"{uuid.uuid4().hex[:12]}-{name}"

    def write(self, content: bytes) -> None:
        self.sink.write_bytes(content)

    def reopen(self) -> pa.NativeFile:
        return pa.OSFile(str(self.sink))

    def publish(self, target: Path) -> None:
        with open(self.sink, "rb") as file:
            os.fsync(file.fileno())
        rename(self.sink, target)

    def discard(self) -> None:
        self.sink.unlink(missing_ok=True)


class _StoreDraft:
    def __init__(self) -> None:
        self.sink = pa.BufferOutputStream()

    def write(self, content: bytes) -> None:
        self.sink.write(content)

    @cached_property
    def _content(self) -> pa.Buffer:
        return self.sink.getvalue()

    def reopen(self) -> pa.NativeFile:
        return pa.BufferReader(self._content)

    def publish(self, target: StorePath) -> None:
        target.write_bytes(self._content)

    def discard(self) -> None:
        """It is gone as soon as nobody holds it."""
