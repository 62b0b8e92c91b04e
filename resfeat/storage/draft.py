"""Drafts: files that are seen whole or not at all.

A file is written as a draft, in a hidden folder on a disk and in memory for a store. Publishing it
is one atomic rename, or one PUT.
"""

import hashlib
import json
import os
import uuid
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from resfeat.storage.location import Location, replace
from resfeat.storage.remote import StorePath


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


def write_whole(folder: Path | None, location: Location, content: bytes) -> None:
    """Write a small file by way of a draft in `folder`."""
    document = draft(folder, location.name)
    try:
        document.write(content)
        document.publish(location)
    finally:
        document.discard()


def write_json(folder: Path | None, location: Location, content: object) -> None:
    """Write a small JSON document, whole or not at all, by way of a draft in `folder`."""
    write_whole(folder, location, (json.dumps(content, indent=2) + "\n").encode())


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
        replace(self.sink, target)

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
