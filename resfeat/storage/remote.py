"""Objects in a store, behind the part of pathlib's interface that we need.

Objects are read and written through pyarrow.fs. Every request has a time limit and is repeated with
growing pauses, and a whole operation is repeated where that did not help. A StoreError therefore
means that the store is out of reach, or says no.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
import pyarrow.fs as fs
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from resfeat.errors import StoreError, first_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SCHEME = "s3://"
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


def patiently(what: object, operation: Callable[[], T]) -> T:
    """What an operation on `what` gives, tried again a few times where the store had trouble.
    Raises FileNotFoundError where there is nothing, and StoreError for all else."""
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
        raise StoreError(
            f"{what}: {first_line(error)}; check the address, the AWS_* variables and the "
            "network, and give the same command again"
        ) from error


def is_refused(error: BaseException) -> bool:
    """Whether the store does not let us, which no other attempt can change."""
    return any(refusal in str(error) for refusal in REFUSALS)


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may end otherwise."""
    told = is_refused(error) or MISSING in str(error) or isinstance(error, FileNotFoundError)
    return isinstance(error, OSError) and not told


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
        return bool(self._type() != fs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self._type() == fs.FileType.Directory)

    def read_bytes(self) -> bytes:
        def read() -> bytes:
            with self.store.open_input_file(str(self.path)) as file:
                content: bytes = file.read()
                if len(content) != file.size():
                    raise OSError(f"{self}: {len(content):,} of {file.size():,} bytes came")
                return content

        return patiently(self, read)

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
            except OSError as error:
                if missing_ok and isinstance(error, FileNotFoundError):
                    return
                missing_ok = True  # as it is where only the answer was lost
                raise

        patiently(self, delete)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there as long as an object has it."""

    def rmdir(self) -> None:
        """Nothing."""

    def remove_all(self) -> None:
        """Remove every object below this one."""
        with suppress(FileNotFoundError):
            patiently(self, lambda: self.store.delete_dir(str(self.path)))

    def _type(self) -> fs.FileType:
        return patiently(self, lambda: self.store.get_file_info(str(self.path)).type)


class StoreFile(io.RawIOBase):
    """An object as a file of which each piece is read patiently."""

    def __init__(self, location: StorePath) -> None:
        self._location, self._at = location, 0
        self._size: int = patiently(location, lambda: self._file.size())

    @cached_property
    def _file(self) -> pa.NativeFile:
        return self._location.store.open_input_file(str(self._location.path))

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
                    content: bytes = self._file.read_at(wanted, self._at)
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
        if file := self.__dict__.pop("_file", None):
            file.close()
