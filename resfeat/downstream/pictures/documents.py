"""Files that are asked for beside an answer: written whole or not at all. Where one cannot be
written, that is told before the work.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from resfeat.errors import ResfeatError, first_line
from resfeat.storage import write_whole


def check_place(path: str) -> None:
    """Raise ResfeatError where a file cannot be written for want of its folder, or of the right to:
    better said before the work than after it."""
    target = Path(path).resolve()
    if target.is_dir():
        raise ResfeatError(f"cannot write {path}: it is a folder; give another path")
    if _is_no_file(target):
        return
    folder = target.parent
    if not folder.is_dir():
        raise ResfeatError(f"cannot write {path}: its folder is not there; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResfeatError(f"cannot write {path}: its folder is read-only; give another path")


def check_picture(path: str) -> None:
    """The same of a picture, whose format is told by the ending of its name."""
    check_place(path)
    _format_of(path)


def write_document(path: str, content: bytes, drafts: Path | None = None) -> None:
    """Write a file that was asked for, whole. drafts: where to write it first; beside it by
    default. Raises ResfeatError where that cannot be."""
    target = Path(path).resolve()  # a link stays one
    try:
        if _is_no_file(target):
            target.write_bytes(content)
        else:
            drafts = drafts or target.parent
            drafts.mkdir(parents=True, exist_ok=True)
            write_whole(drafts, target, content)
    except OSError as error:
        raise ResfeatError(
            f"cannot write {path}: {error.strerror or first_line(error)}; give another path"
        ) from error


def write_picture(path: str, picture: Image.Image) -> None:
    """The same of a picture."""
    content = io.BytesIO()
    try:
        picture.save(content, _format_of(path))
    except (OSError, ValueError, OverflowError) as error:  # not every format takes long sides
        raise ResfeatError(
            f"cannot write {path}: {first_line(error)}; give a path that ends in .png"
        ) from error
    write_document(path, content.getvalue())


def _is_no_file(target: Path) -> bool:
    """Whether it is there, and is a pipe or a device, such as /dev/stdout."""
    return target.exists() and not target.is_file()


def _format_of(path: str) -> str:
    found = Image.registered_extensions().get(Path(path).suffix.lower(), "")
    if found not in Image.SAVE:
        raise ResfeatError(f"cannot write {path}: give a path that ends in .png")
    return found
