"""Objects in a store (S3, Google, Azure), behind the part of pathlib's interface that we need.

obstore sends every request again, with growing pauses, until it gets through or a limit is reached.
A StoreError therefore means that the store is out of reach, or says no.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from resfeat.errors import StoreError
from resfeat.storage.clouds import (
    BadKeyError,
    BrokenError,
    ChangedError,
    RefusedError,
    asking,
    connect,
    split,
)

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta
    from obstore.store import ObjectStore

P = ParamSpec("P")
T = TypeVar("T")

CONNECT_SECONDS = 5
REQUEST_SECONDS = 10  # without a byte of the answer
# No byte of an answer comes before an upload has ended, so large ones are given longer.
UPLOAD_SECONDS = 60
LARGE = 1 << 20
# One request, its whole body included. A signal is not noticed before a request has ended.
WHOLE_SECONDS = 300
# How often a request is sent again, and for how long: with pauses of a second, some 8 s of faults.
ATTEMPTS = 10
RETRY_SECONDS = 60
# Between two tries of what obstore does not try again.
PAUSE_SECONDS = 0.2


@lru_cache
def store(root: str, read_seconds: float | None = None) -> ObjectStore:
    """The client of a bucket, `s3://BUCKET` or the like. Endpoint, region and credentials are those
    of each cloud's usual variables. Not for a child that was forked: its requests would hang."""
    limits = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": read_seconds or REQUEST_SECONDS,
        "timeout": WHOLE_SECONDS,
    }
    return connect(root, limits, ATTEMPTS, RETRY_SECONDS)


def patient(operation: Callable[P, T]) -> Callable[P, T]:
    """The same, done once more where an answer breaks off on the way, for which obstore does not
    ask again."""

    @wraps(operation)
    def attempts(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(ATTEMPTS):
            try:
                return operation(*args, **kwargs)
            except BrokenError:
                time.sleep(PAUSE_SECONDS)
        return operation(*args, **kwargs)

    return attempts


@dataclass(frozen=True)
class Version:
    """Which content an object had: what a compare-and-swap compares. Google's has a generation."""

    e_tag: str | None
    generation: str | None = None

    @classmethod
    def of(cls, told: Any) -> Version:
        """From what obstore tells of an object, or of a write."""
        return cls(told["e_tag"], told["version"])

    @property
    def mode(self) -> Any:
        """Of a write that takes effect only while the object has this version."""
        given = {"e_tag": self.e_tag, "version": self.generation}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class StorePath:
    """An object, or what its name begins with. Folders are not made there.

    root: scheme and bucket, as `s3://bucket`. path: the key; `.` is the bucket itself.
    """

    root: str
    path: PurePosixPath

    @classmethod
    def of(cls, address: str) -> StorePath:
        root, key = split(address)
        return cls(root, PurePosixPath(key))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self.root, self.path / name)

    @property
    def key(self) -> str:
        return "" if self.path == PurePosixPath() else str(self.path)

    @property
    def name(self) -> str:
        return self.path.name or split(self.root + "/")[0].rpartition("/")[2]

    @property
    def parent(self) -> StorePath:
        return StorePath(self.root, self.path.parent)

    @property
    def bucket(self) -> StorePath:
        return StorePath(self.root, PurePosixPath())

    @property
    def store(self) -> ObjectStore:
        return store(self.root)

    def with_suffix(self, suffix: str) -> StorePath:
        return StorePath(self.root, self.path.with_suffix(suffix))

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return bool(self.key and self.version()) or self.is_dir()

    def is_dir(self) -> bool:
        """Whether there is an object below it."""
        try:
            return self._has_objects()
        except BadKeyError:  # below it
            return True

    @patient
    def _has_objects(self) -> bool:
        with asking(self):
            return any(self.store.list(self.key or None, chunk_size=1))

    @patient
    def read_bytes(self) -> bytes:
        with asking(self):
            return bytes(self.store.get(self.key).bytes())

    @patient
    def read_versioned(self) -> tuple[bytes, Version]:
        """What is there, and its version for `swap`. Raises FileNotFoundError."""
        with asking(self):
            found = self.store.get(self.key)
            return bytes(found.bytes()), Version.of(found.meta)

    @patient
    def version(self) -> Version | None:
        """The version of what is there; None where there is nothing."""
        with suppress(FileNotFoundError), asking(self):
            return Version.of(self.store.head(self.key))
        return None

    def create(self, content: bytes) -> Version | None:
        """Write it if there is nothing yet; None where there is something of another's.

        content: unlike what anybody else writes there, so that our own is known again.
        """
        return self._write_over(None, content)

    def swap(self, content: bytes, version: Version) -> Version | None:
        """Write it if there still is this version; None where that was replaced, or is gone.

        content: unlike what anybody else writes there, so that our own is known again.
        """
        return self._write_over(version, content)

    def _write_over(self, before: Version | None, content: bytes) -> Version | None:
        """The version written; None unless `before` was there (None: nothing).

        What the store says is not all: the answer to a write that took effect may be lost, and the
        next attempt then meets our own content. And a store says "conflict" to two at once, none of
        which need have written. So whatever it says but yes, look what is there.
        """
        # In one piece: an upload that fails half way then leaves nothing behind.
        mode: Any = before.mode if before else "create"
        for _ in range(ATTEMPTS):
            try:
                with asking(self):
                    told = self._store_for(content).put(
                        self.key, content, mode=mode, use_multipart=False
                    )
                    return Version.of(told)
            except RefusedError:
                raise
            except (FileNotFoundError, ChangedError, StoreError) as error:
                why = error
            try:
                there, now = self.read_versioned()
            except FileNotFoundError:
                if before:
                    return None
            else:
                if there == content:
                    return now
                if now != before:
                    return None
            time.sleep(PAUSE_SECONDS)
        raise why

    def _store_for(self, content: bytes) -> ObjectStore:
        return store(self.root, UPLOAD_SECONDS) if len(content) > LARGE else self.store

    def iterdir(self) -> Iterator[StorePath]:
        """The objects and prefixes right below this one."""
        found = self._children()
        names = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        for path in map(PurePosixPath, dict.fromkeys(names)):
            if path != self.path:  # as a marker of it would be
                yield StorePath(self.root, path)

    @patient
    def _children(self) -> ListResult[Sequence[ObjectMeta]]:
        with asking(self):
            return self.store.list_with_delimiter(self.key or None)

    def unlink(self, missing_ok: bool = False) -> None:
        # S3 says yes to the removal of what is not there.
        if not missing_ok and not self.version():
            raise FileNotFoundError(f"{self} does not exist")
        self._delete([self.key])

    @patient
    def _delete(self, keys: Sequence[str]) -> None:
        # What is not there is gone by an attempt of which the answer was lost, or by another.
        with suppress(FileNotFoundError), asking(self):
            self.store.delete(keys)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there as long as an object has it."""
