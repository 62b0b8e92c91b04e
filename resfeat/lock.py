"""One writer at a time on a dataset.

An advisory lock (flock) on `_resfeat/lock`, in which the holder writes who it is. The kernel drops
the lock when its process ends, however it ends, so a lock is never stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone

from resfeat.errors import ResfeatError
from resfeat.layout import Layout

# `resfeat status` holds the lock for an instant while it looks; that is no reason to refuse.
PATIENCE_SECONDS = 0.5


@contextmanager
def run_lock(layout: Layout) -> Iterator[None]:
    """Hold the dataset's lock. Raises ResfeatError, naming the holder, where another has it."""
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+", encoding="utf-8") as file:
        if not _try(descriptor, fcntl.LOCK_EX, PATIENCE_SECONDS):
            raise ResfeatError(
                f"{layout.root} is being written by {_describe(file.read())}: "
                "wait until that run has ended, or stop it"
            )
        file.truncate(0)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started}, file)
        file.flush()
        yield


def holder(layout: Layout) -> str | None:
    """Who is writing the dataset now; None where nobody is."""
    with suppress(FileNotFoundError), open(layout.lock, encoding="utf-8") as file:
        if not _try(file.fileno(), fcntl.LOCK_SH, 0):
            return _describe(file.read())
    return None


def _try(descriptor: int, kind: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def _describe(content: str) -> str:
    try:
        writer = json.loads(content)
        return f"process {writer['pid']} on {writer['host']} since {writer['started']}"
    except (ValueError, KeyError):  # it has the lock and has not yet written who it is
        return "another process"
