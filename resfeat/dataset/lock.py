"""One writer at a time on a share of a dataset.

The lock file says who is writing. A run that ends in order empties it, so what stands in it
afterwards tells of a run that was killed. On a disk it is also held by flock, which the kernel
drops when the process ends. In a store the holder writes it again every few seconds, and a lock
that has not changed for a while is stale. Of two that begin at once, the later one has it.
"""

import errno
import fcntl
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from resfeat.dataset.layout import Layout
from resfeat.errors import ResfeatError, StoreError
from resfeat.storage import StorePath, file_system_of

# `resfeat status` holds the lock for an instant while it looks; that is no reason to refuse.
PATIENCE_SECONDS = 0.5
# What flock says where a file system does not have it, as Lustre may not.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# In a store: how often the holder writes it, how long it may then stay unchanged, and how long two
# that write it at once may be apart.
BEAT_SECONDS = 10.0
STALE_SECONDS = 40.0
SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Writer:
    """A process that writes a dataset. machine, began: as Linux has them, empty elsewhere."""

    host: str
    machine: str  # since its last start, and the container on it: several may have a host's name
    pid: int
    began: str  # when the process did, since a process id may be another's by now
    started: str  # when its run did
    token: str  # of the run
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.started}"

    @classmethod
    def me(cls) -> Self:
        now, pid = datetime.now(UTC).isoformat(timespec="seconds"), os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _began(pid), now, secrets.token_hex(8))

    @classmethod
    def parse(cls, content: str | bytes) -> Self | None:
        """The writer that a lock names; None where it names nobody."""
        try:
            writer = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        return writer if isinstance(writer.pid, int) else None

    def is_alive(self) -> bool | None:
        """Whether its process is there; None where that cannot be told from here."""
        if not self.machine or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # of another user, and there
        now = _began(self.pid)
        return now == self.began if now and self.began else True


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began, in clock ticks since its machine did; empty where nobody says."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        return ""


@dataclass(frozen=True)
class Lock:
    """A lock that is held."""

    output: str
    killed: Writer | None  # who held it last, if that run was killed
    taken: threading.Event = field(default_factory=threading.Event)  # set once another has it

    def check(self) -> None:
        """Raise ResfeatError once another has it."""
        if self.taken.is_set():
            raise ResfeatError(
                f"another run took {self.output} over, since this one was out of reach of the "
                "store for too long: nothing is lost; let that one finish"
            )


@contextmanager
def run_lock(
    layout: Layout, *, is_run: bool = True, on_wait: Callable[[str], None] = lambda why: None
) -> Iterator[Lock]:
    """Hold the dataset's lock. Raises ResfeatError, naming the holder, where another has it.

    is_run: whether what follows goes on with the work of a run that was killed; what does not
    leaves word of that run for the one that will. on_wait: is told before it takes long.
    """
    if isinstance(layout.lock, StorePath):
        with _held_in_store(layout, layout.lock, is_run, on_wait) as lock:
            yield lock
        return
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+", encoding="utf-8") as file:
        is_mine = _try(layout.lock, descriptor, fcntl.LOCK_EX, PATIENCE_SECONDS)
        before = Writer.parse(content := file.read())
        if not is_mine:
            raise _refused(layout, before)
        _overwrite(descriptor, json.dumps(asdict(Writer.me())))
        try:
            yield Lock(str(layout.root), before)
        finally:
            _overwrite(descriptor, content if before and not is_run else "")


def holder(layout: Layout) -> str | None:
    """Who is writing the dataset now; None where nobody is."""
    if isinstance(layout.lock, StorePath):
        writer = _read(layout.lock)
        return None if writer is None or writer.is_alive() is False else str(writer)
    # Where there are no locks, nobody can tell, and nobody can write.
    with suppress(FileNotFoundError, ResfeatError), open(layout.lock, encoding="utf-8") as file:
        if not _try(layout.lock, file.fileno(), fcntl.LOCK_SH, 0):
            return str(Writer.parse(file.read()) or "another process")
    return None


def _refused(layout: Layout, writer: Writer | None) -> ResfeatError:
    return ResfeatError(
        f"{layout.root} is being written by {writer or 'another process'}: "
        "wait until that run has ended, or stop it"
    )


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


@contextmanager
def _held_in_store(
    layout: Layout, lock: StorePath, is_run: bool, on_wait: Callable[[str], None]
) -> Iterator[Lock]:
    before = _read(lock)
    if before and before.is_alive() is not False:
        if _is_beating(lock, before, on_wait):
            raise _refused(layout, before)
        before = _read(lock)  # nobody, if it was given up while we watched
    me = Writer.me()
    _write(lock, me)
    time.sleep(SETTLE_SECONDS)
    if (now := _read(lock)) != me:
        raise _refused(layout, now)
    held, ended = Lock(str(layout.root), before), threading.Event()

    def beat() -> None:
        beats = itertools.count(1)
        while not ended.wait(BEAT_SECONDS):
            with suppress(StoreError):  # out of reach for now; the next beat may come through
                there = _read(lock)
                if there and there.token != me.token:
                    held.taken.set()
                    return
                _write(lock, replace(me, beat=next(beats)))

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield held
        held.check()
    finally:
        ended.set()
        thread.join()
        with suppress(StoreError):
            there = _read(lock)
            if there and there.token == me.token:  # else another took it since the last beat
                if before and not is_run:
                    _write(lock, before)
                else:
                    lock.unlink(missing_ok=True)


def _read(lock: StorePath) -> Writer | None:
    try:
        return Writer.parse(lock.read_bytes())
    except FileNotFoundError:
        return None


def _write(lock: StorePath, writer: Writer) -> None:
    lock.write_bytes(json.dumps(asdict(writer)).encode())


def _is_beating(lock: StorePath, writer: Writer, on_wait: Callable[[str], None]) -> bool:
    """Whether its holder writes the lock, or gives it up, while we watch."""
    if writer.is_alive():
        return True
    on_wait(f"{writer} was writing here: looking for {STALE_SECONDS:.0f} s whether it still is")
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1)
        now = _read(lock)
        if now != writer:
            return now is not None
    return False
