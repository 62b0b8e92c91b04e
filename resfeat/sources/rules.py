"""What is taken for an image, and how it is called: the same wherever it lies."""

import itertools
import os
import re
from collections.abc import Sequence

from resfeat.errors import Failure, UsageError
from resfeat.sources.item import Item

MAX_BYTES = 256 * 1024**2

# What travels beside images, by extension. Anything else is recognised by its content.
SIDECARS = frozenset(
    ".arrow .cfg .csv .db .doc .docx .gz .htm .html .ini .json .jsonl .log .md .ndjson .npy .npz"
    " .parquet .pdf .pkl .py .rst .sh .sqlite .tar .tgz .toml .tsv .txt .xls .xlsx .xml .yaml .yml"
    " .zip"
    # of WebDataset
    " .cbor .class .cls .cls2 .count .id .index .inx .jsn .mp .msg .msgpack .pickle .pt .pth .pyd"
    " .tb .ten .text .transcript".split()
)
# How names of images end, the usual ones first.
_IMAGES = [f".{each}/" for each in "jpg jpeg png webp gif bmp tif tiff avif heic heif".split()]

# Of a column of paths, for Arrow: all others may be images.
LIKELY_PASSED_OVER = rf"(?i)(?:(?:^|/)\.[^/]*|{'|'.join(map(re.escape, sorted(SIDECARS)))})$"


def passed_over(name: str) -> str | None:
    """Why a file of this name is skipped; None if it may be an image."""
    if name.startswith("."):
        return "hidden"
    extension = name[name.rfind(".") :].lower()  # a last letter, where there is no dot
    return extension if extension in SIDECARS else None


def may_be_passed_over(names: Sequence[str]) -> bool:
    """False only if `passed_over` gives None for each of these names; faster than asking it."""
    text = f"/{'/'.join(names)}/".lower()
    if "/." in text:
        return True
    dots = text.count(".")  # which no extension of an image explains
    for ending in _IMAGES:
        if not dots:
            return False
        dots -= text.count(ending)
    return dots > 0


def check_apart(roots: Sequence[str]) -> None:
    """Raise UsageError where one of these sorted paths lies within another."""
    for outer, inner in itertools.pairwise(roots):
        if inner == outer or inner.startswith(os.path.join(outer, "")):
            raise UsageError(f"source {inner} lies within source {outer}: name only one of them")


def printable(path: str) -> str:
    r"""The path as valid UTF-8, different for different paths.

    Bytes that are not UTF-8 become `\xNN`; where that could be misread, a backslash is doubled.
    """
    raw = os.fsencode(path)
    text = raw.decode("utf-8", "backslashreplace")
    if "\\x" in text:
        text = raw.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    return text


def folder_of(path: str) -> str:
    return printable(os.path.basename(os.path.dirname(path)))


def extent(item: Item, held: int) -> tuple[int, int] | Failure:
    """Where an item's bytes begin in the file that holds them, of `held` bytes, and how many there
    are; or why they are not read."""
    start, size = (0, held) if item.offset is None else (item.offset, item.size or 0)
    if size > MAX_BYTES:
        return Failure("read", "too_large", f"{size:,} bytes; {MAX_BYTES:,} at most")
    if start + size > held:
        message = f"it would end at byte {start + size:,}, and the file has {held:,}"
        return Failure("read", "bad_container", message)
    return (start, size) if size else Failure("read", "empty", "0 bytes")
