"""Who writes a dataset: the name in a lock, and the lock as its holder has it."""

import json
import os
import secrets
import socket
import threading
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from resfeat.dataset.layout import ALL, Layout
from resfeat.errors import ResfeatError


@dataclass(frozen=True)
class Writer:
    """A process that writes a dataset. machine, began: as Linux has them, empty elsewhere."""

    host: str
    machine: str  # since its last start, and the container on it: several may have a host's name
    pid: int
    began: str  # when the process did, since a process id may be another's by now
    started: str  # when its run did
    token: str  # of the run
    share: str = ALL  # of the dataset, that its run writes
    beat: str = ""  # in a store: another one each time that it is written

    def __str__(self) -> str:
        which = "" if self.share == ALL else f"partition {self.share.replace('-of-', '/')}, "
        return f"{which}process {self.pid} on {self.host} since {self.started}"

    @classmethod
    def me(cls, share: str = ALL) -> Self:
        now, pid = datetime.now(UTC).isoformat(timespec="seconds"), os.getpid()
        token = secrets.token_hex(8)
        return cls(socket.gethostname(), _machine(), pid, _began(pid), now, token, share)

    @classmethod
    def parse(cls, content: str | bytes) -> Self | None:
        """The writer that a lock names; None where it names nobody."""
        try:
            writer = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        return writer if isinstance(writer.pid, int) else None

    def as_json(self) -> str:
        return json.dumps(asdict(self))

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


@dataclass
class Lock:
    """A lock that is held. On a disk it stays so until it is given up: the kernel sees to that."""

    output: str
    killed: Writer | None  # who held it last, if that run was killed
    token: str | None = None  # of a lease: the lock object names it
    taken: threading.Event = field(default_factory=threading.Event)  # set once another has it

    def check(self) -> None:
        """Raise ResfeatError once another has it."""
        if self.taken.is_set():
            raise overtaken(self.output)

    def is_held(self) -> bool:
        """Whether it certainly is ours still."""
        try:
            self.check()
        except ResfeatError:
            return False
        return True


def is_word(before: Writer | None, layout: Layout) -> bool:
    """Whether this is word of a run that wrote what the lock is for. A partition holds that of the
    whole for a moment; if it is killed then, its own lock has the word of it."""
    return before is not None and before.share == layout.share


def overtaken(output: object) -> ResfeatError:
    return ResfeatError(
        f"another run took {output} over, since this one was out of reach of the store for too "
        "long: nothing is lost; let that one finish"
    )


class HeldError(ResfeatError):
    """Another holds the lock: writer, where it says who."""

    def __init__(self, output: object, writer: Writer | None) -> None:
        super().__init__(
            f"{output} is being written by {writer or 'another process'}: "
            "wait until that run has ended, or stop it"
        )
        self.writer = writer


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
