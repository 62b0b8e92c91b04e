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
from typing import Any

import pyarrow as pa

from resfeat.storage.location import Location, replace
from resfeat.storage.remote import StorePath


class DiskDraft:
    """A file in a hidden folder. `sink` is what to write to."""

    def __init__(self, folder: Path, name: str) -> None:
        # Unique, so that a worker thought dead and its successor never write to one file.
        self.sink = folder / f"{uuid.uuid4().hex[:12]}-{name}"

    def reopen(self) -> pa.NativeFile:
        """What was written, whole."""
        return pa.OSFile(str(self.sink))

    def publish(self, target: Any) -> None:
        """Put the file in its place, so that it survives a power cut."""
        with open(self.sink, "rb") as file:
            os.fsync(file.fileno())
        replace(self.sink, target)

    def discard(self) -> None:
        """Forget it, unless it was published."""
        self.sink.unlink(missing_ok=True)


class StoreDraft:
    """The same in memory, for a store."""

    def __init__(self) -> None:
        self.sink = pa.BufferOutputStream()

    @cached_property
    def _content(self) -> pa.Buffer:
        return self.sink.getvalue()

    def reopen(self) -> pa.NativeFile:
        return pa.BufferReader(self._content)

    def publish(self, target: Any) -> None:
        target.write_bytes(self._content)

    def discard(self) -> None:
        """It is gone as soon as nobody holds it."""


Draft = DiskDraft | StoreDraft


def draft(folder: Path | None, name: str) -> Draft:
    """A new draft: in a folder on the file system of its target, or, for a store, in memory."""
    return StoreDraft() if folder is None else DiskDraft(folder, name)


def sha256(draft: Draft) -> str:
    """Digest of a draft that is whole, 64 hex digits."""
    with draft.reopen() as file:
        return hashlib.sha256(file.read_buffer()).hexdigest()


def write_whole(folder: Path | None, location: Location, content: bytes) -> None:
    """Write a small file, whole or not at all; on a disk by way of a draft in `folder`."""
    if isinstance(location, StorePath) or folder is None:
        location.write_bytes(content)
        return
    document = DiskDraft(folder, location.name)
    try:
        document.sink.write_bytes(content)
        document.publish(location)
    finally:
        document.discard()


def write_json(folder: Path | None, location: Location, content: object) -> None:
    """Write a small JSON document, as `write_whole` does."""
    write_whole(folder, location, (json.dumps(content, indent=2) + "\n").encode())
