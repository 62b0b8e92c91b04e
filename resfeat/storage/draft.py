"""Drafts: files that are seen whole or not at all.

A draft is a file in a hidden folder, or, for a store, bytes in memory. Publishing it is one atomic
rename, or one PUT.
"""

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from resfeat.storage.fence import Fence
from resfeat.storage.location import Location, sync


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
        os.replace(self.sink, target)
        for folder in {target.parent, self.sink.parent}:
            sync(folder)

    def discard(self) -> None:
        """Forget it, unless it was published."""
        with suppress(FileNotFoundError, NotADirectoryError):  # where none could be made
            self.sink.unlink()


class StoreDraft:
    """The same in memory, for a store."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence
        self.sink = pa.BufferOutputStream()

    def reopen(self) -> pa.NativeFile:
        return pa.BufferReader(self.sink.getvalue())

    def publish(self, target: Any) -> None:
        self._fence.write(target, self.sink.getvalue().to_pybytes())

    def discard(self) -> None:
        """It is gone as soon as nobody holds it."""


Draft = DiskDraft | StoreDraft
# Where drafts are made: a folder on the file system of their targets, or, for a store, memory.
Drafts = Path | Fence


def draft(drafts: Drafts, name: str) -> Draft:
    """A new draft."""
    return StoreDraft(drafts) if isinstance(drafts, Fence) else DiskDraft(drafts, name)


def sha256(draft: Draft) -> str:
    """Digest of a draft that is whole, 64 hex digits."""
    with draft.reopen() as file:
        return hashlib.sha256(file.read_buffer()).hexdigest()


def write_whole(drafts: Drafts, location: Any, content: bytes) -> None:
    """Write a small file, whole or not at all; on a disk by way of a draft."""
    if isinstance(drafts, Fence):
        drafts.write(location, content)
        return
    document = DiskDraft(drafts, location.name)
    try:
        document.sink.write_bytes(content)
        document.publish(location)
    finally:
        document.discard()


def write_json(drafts: Drafts, location: Location, content: object) -> None:
    write_whole(drafts, location, (json.dumps(content, indent=2) + "\n").encode())
