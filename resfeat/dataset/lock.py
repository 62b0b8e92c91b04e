"""One writer at a time on a share of a dataset.

The lock file says who is writing. A run that ends in order empties it, so what stands in it
afterwards tells of a run that was killed. On a disk it is also held by flock, which the kernel
drops when the process ends. In a store it is a lease (`lease.py`).
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resfeat.dataset.layout import Layout
from resfeat.dataset.lease import held_in_store, writer_in_store
from resfeat.dataset.writer import HeldError, Lock, Writer, is_word
from resfeat.errors import ResfeatError
from resfeat.storage import StorePath, file_system_of

# `resfeat status` holds the lock for an instant while it looks; that is no reason to refuse.
PATIENCE_SECONDS = 0.5
# What flock says where a file system does not have it, as Lustre may not.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def run_lock(
    layout: Layout,
    *,
    is_run: bool = True,
    on_wait: Callable[[str], None] = lambda why: None,
    share: str | None = None,
) -> Iterator[Lock]:
    """Hold the dataset's lock. Raises ResfeatError, naming the holder, where another has it.

    is_run: whether what follows goes on with the work of a run that was killed; what does not
    leaves word of that run for the one that will. on_wait: is told before it takes long. share:
    what the holder writes, where that is not what it locks: of such a one no word is left, which
    its own lock has.
    """
    me = Writer.me(share or layout.share)
    if isinstance(layout.lock, StorePath):
        with held_in_store(layout, me, is_run, on_wait) as lease:
            yield lease
        return
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+", encoding="utf-8") as file:
        is_mine = _try(layout.lock, descriptor, fcntl.LOCK_EX, PATIENCE_SECONDS)
        before = Writer.parse(content := file.read())
        if not is_mine:
            raise HeldError(layout.root, before)
        _overwrite(descriptor, me.as_json())
        try:
            yield Lock(str(layout.root), before)
        finally:
            _overwrite(descriptor, content if not is_run and is_word(before, layout) else "")


def refusal(layout: Layout) -> HeldError | None:
    """What a run would be told that wants this lock now; None where nobody has it."""
    if isinstance(layout.lock, StorePath):
        writer = writer_in_store(layout)
        return HeldError(layout.root, writer) if writer else None
    # Where there are no locks, nobody can tell, and nobody can write.
    with suppress(FileNotFoundError, ResfeatError), open(layout.lock, encoding="utf-8") as file:
        if not _try(layout.lock, file.fileno(), fcntl.LOCK_SH, 0):
            return HeldError(layout.root, Writer.parse(file.read()))
    return None


def holder(layout: Layout) -> str | None:
    """Who is writing the dataset now; None where nobody is."""
    found = refusal(layout)
    return str(found.writer or "another process") if found else None


def _try(path: Path, descriptor: int, kind: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise ResfeatError(
                f"{path} is on {file_system_of(path)}, which has no file locks, so two runs could "
                "write there at once: mount it with flock, or write to another file system"
            ) from error


def _overwrite(descriptor: int, content: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content.encode(), 0)
