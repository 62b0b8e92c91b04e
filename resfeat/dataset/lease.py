"""The lock of a dataset in an object store: a lease.

The lock object names its holder. It is created where there is none (create-if-absent), and from
then on only replaced, by compare-and-swap: to renew the lease, to take it over, and to give it up,
after which it names nobody. Nothing deletes it: a store cannot delete on a condition, and a delete
that arrives late would remove the lock of another.

    holder    renews every BEAT_SECONDS, and trusts its lease for LEASE_SECONDS from the moment it
              *sent* the last renewal that came through
    another   may take it over once it has seen the same content for STALE_SECONDS from the moment
              it had *read* it

Each goes by its own clock, and LEASE_SECONDS is less than STALE_SECONDS: when another may take the
lease, its holder has stopped trusting it, whatever was delayed or lost on the way. A process that
was paused finds its trust expired when it wakes, and `check` then renews before it lets anything
pass. Each write has content that was never there before: S3's version of an object is a digest, so
the same content once more would bring an old version back.

What a holder sent while the lease was its own may still arrive later. `storage.Fence` sees to that.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from resfeat.dataset.layout import Layout
from resfeat.dataset.writer import HeldError, Lock, Writer, is_word, overtaken
from resfeat.errors import ResfeatError, StoreError
from resfeat.storage import StorePath, Version

BEAT_SECONDS = 10.0
LEASE_SECONDS = 30.0
STALE_SECONDS = 40.0
# How often another looks meanwhile.
LOOK_SECONDS = 1.0
# A clock that goes on while the machine is suspended, where there is one.
CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Lease(Lock):
    """A lease that is held, and renewed by a thread. sent: when `version` was, by `_now`."""

    def __init__(
        self, layout: Layout, killed: Writer | None, me: Writer, version: Version, sent: float
    ) -> None:
        super().__init__(str(layout.root), killed, me.token)
        self._place, self._me, self._version, self._sent = _place(layout), me, version, sent
        self._swapping = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ResfeatError unless it is certainly ours; StoreError where that cannot be told."""
        while self._is_expired() and not (self.taken.is_set() or self._ended.is_set()):
            with self._swapping:
                if self._is_expired():  # still: the thread may just have renewed it
                    self._renew()
        super().check()
        if self._ended.is_set():
            raise ResfeatError(f"the run has given {self.output} up: nothing more is written")

    def give_up(self, word: Writer | None) -> None:
        """Leave the lock to whoever comes. word: of a run that was killed, for the next one."""
        self._ended.set()
        self._thread.join()
        with self._swapping, suppress(StoreError):  # it is then stale after a while
            if not self.taken.is_set():
                self._swap(_named(word) if word else _nobody())

    def _is_expired(self) -> bool:
        return _now() > self._sent + LEASE_SECONDS

    def _keep(self) -> None:
        while not (self._ended.wait(BEAT_SECONDS) or self.taken.is_set()):
            with self._swapping, suppress(StoreError):  # the next one may come through
                self._renew()

    def _renew(self) -> None:
        sent = _now()
        if self._swap(_named(self._me)):
            self._sent = sent
        else:
            self.taken.set()

    def _swap(self, content: bytes) -> bool:
        """Replace what we wrote last. False once the lock is not ours any more."""
        while not (version := self._place.swap(content, self._version)):
            there, now = _look(self._place)
            if there is None or now is None or there.token != self.token:
                return False
            self._version = now  # a renewal that was given up as lost has arrived
        self._version = version
        return True


@contextmanager
def held_in_store(
    layout: Layout, me: Writer, is_run: bool, on_wait: Callable[[str], None]
) -> Iterator[Lease]:
    """Hold the lease. Raises ResfeatError, naming the holder, where another has it."""
    place = _place(layout)
    before, version = _look(place)
    if before and before.is_alive() is not False:
        before, version = _left(layout, before, on_wait)
    sent = _now()
    content = _named(me)
    version = place.swap(content, version) if version else place.create(content)
    if version is None:  # another was faster
        raise HeldError(layout.root, _look(place)[0])
    lease = Lease(layout, before, me, version, sent)
    layout.fence.check = lease.check
    try:
        yield lease
        lease.check()
    finally:
        lease.give_up(before if not is_run and is_word(before, layout) else None)


def writer_in_store(layout: Layout) -> Writer | None:
    """Whom the lock names; None where that is nobody, or a process that is gone."""
    writer, _ = _look(_place(layout))
    return None if writer is None or writer.is_alive() is False else writer


def check_lease(layout: Layout, token: str) -> None:
    """Raise ResfeatError unless the lock names this run: a worker, in a process of its own, sees no
    more of the lease."""
    writer, _ = _look(_place(layout))
    if writer is None or writer.token != token:
        raise overtaken(layout.root)


def _left(
    layout: Layout, writer: Writer, on_wait: Callable[[str], None]
) -> tuple[Writer | None, Version | None]:
    """The lock, once its holder has not renewed it for long enough, or has given it up. Raises
    ResfeatError where the holder is there."""
    if writer.is_alive():
        raise HeldError(layout.root, writer)
    on_wait(f"{writer} was writing here: looking for {STALE_SECONDS:.0f} s whether it still is")
    there, version = _look(_place(layout))
    until = _now() + STALE_SECONDS
    while there == writer and _now() < until:
        time.sleep(LOOK_SECONDS)
        there, version = _look(_place(layout))
    if there and there != writer:
        raise HeldError(layout.root, there)
    return there, version


def _place(layout: Layout) -> StorePath:
    assert isinstance(layout.lock, StorePath)
    return layout.lock


def _look(place: StorePath) -> tuple[Writer | None, Version | None]:
    """Whom the lock names, and its version; no version where there is no lock yet."""
    try:
        content, version = place.read_versioned()
    except FileNotFoundError:
        return None, None
    return Writer.parse(content), version


def _named(writer: Writer) -> bytes:
    return replace(writer, beat=secrets.token_hex(8)).as_json().encode()


def _nobody() -> bytes:
    return json.dumps({"free": secrets.token_hex(8)}).encode()


def _now() -> float:
    return time.clock_gettime(CLOCK)
