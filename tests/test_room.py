"""Large pictures are decoded as there is memory for them, and none hangs while it waits."""

import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from resfeat.decoding import MAX_PIXELS, Room
from resfeat.worker import worker as module
from resfeat.worker.worker import Worker

SOON = 10.0  # seconds for what should happen at once


@contextmanager
def thread(target):
    started = threading.Thread(target=target, daemon=True)
    started.start()
    yield started
    started.join(SOON)
    assert not started.is_alive()


def asks(room, pixels, entered):
    def take():
        with room.of(pixels):
            entered.append(pixels)

    return thread(take)


def waiting(room):
    """Wait until somebody waits for room, and give the lock that says so."""
    until = time.monotonic() + SOON
    while not room._turn.locked():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_what_there_is_no_room_for_waits():
    room, entered = Room(100), []
    with ExitStack() as ended, room.of(60), room.of(40):
        ended.enter_context(asks(room, 1, entered))
        waiting(room)
        assert entered == []
    assert entered == [1]
    with room.of(100):  # all of it is free again
        pass


def test_small_ones_pass_no_large_one_by():
    room, entered = Room(100), []
    with ExitStack() as ended, room.of(50):
        ended.enter_context(asks(room, 60, entered))
        waiting(room)
        ended.enter_context(asks(room, 10, entered))
        time.sleep(0.05)
        assert entered == []
    assert entered == [60, 10]


def test_what_is_too_large_for_all_of_it_is_let_in_alone():
    room, entered = Room(100), []
    with ExitStack() as ended, room.of(1000):
        ended.enter_context(asks(room, 1, entered))
        waiting(room)
        assert entered == []


@pytest.mark.parametrize(
    ("gigabytes", "cpus", "pixels"),
    [(4, 2, MAX_PIXELS), (10, 2, 8 * 1024**3 // 16), (20, 1, 8 * 1024**3 // 16)],
)
def test_a_workers_room_is_its_share_of_the_memory(gigabytes, cpus, pixels, monkeypatch):
    monkeypatch.setattr(module, "memory_bytes", lambda: gigabytes * 1024**3)
    monkeypatch.setattr(module, "cpu_count", lambda: 2)
    assert module.pixels_at_once(cpus) == pixels


def test_a_picture_that_waits_for_room_does_not_hang(monkeypatch):
    worker = Worker.__new__(Worker)  # without its threads and its model
    worker.decoding_since, worker._room = {}, Room(module.SMALL_PIXELS)
    seen = []

    def decode(data, preprocessing, way, room):
        seen.append(len(worker.decoding_since))
        with room(len(data)):
            seen.append(len(worker.decoding_since))

    monkeypatch.setattr(module, "decode", decode)
    with ExitStack() as ended, worker._room.of(1):
        large = range(module.SMALL_PIXELS)
        ended.enter_context(thread(lambda: worker.decode(large, None, "turbo")))
        waiting(worker._room)
        assert seen == [1] and worker.decoding_since == {}
    assert seen == [1, 1] and worker.decoding_since == {}
    with worker._room.of(module.SMALL_PIXELS):  # a small one asks for none
        worker.decode(b"small", None, "turbo")
