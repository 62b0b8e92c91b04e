"""One input image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """One input image, as it was listed.

    id: its path relative to the source, unique in the dataset.
    uri: where its bytes are, percent-encoded, so that any file name survives.
    size: bytes.
    mtime: last modification, microseconds since 1970 in UTC.
    """

    id: str
    uri: str
    size: int
    mtime: int
