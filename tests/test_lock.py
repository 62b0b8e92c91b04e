"""The lock of a dataset: on a disk, and in a store with a heart that beats faster."""

import errno
import json
import os
import re
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import boto3
import pytest
from object_store import FaultyProxy, ObjectStore

from resfeat.dataset import Layout
from resfeat.dataset import lock as locks
from resfeat.dataset.lock import holder, run_lock
from resfeat.errors import ResfeatError
from resfeat.run import _tidy
from resfeat.storage import file_system_of
from resfeat.storage import remote as stores

BEAT = 0.3
STALE = 2.5

OTHER = {
    "host": "elsewhere", "machine": "another", "pid": 7, "began": "1", "token": "0123",
    "started": "2020-01-01T00:00:00+00:00",
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as server:
        yield server


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(locks, "STALE_SECONDS", STALE)
    with FaultyProxy(server.endpoint) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        stores.store.cache_clear()
        yield proxy


class Elsewhere:
    """The lock as another machine sees it."""

    def __init__(self, server):
        self.client = boto3.client(
            "s3", endpoint_url=server.endpoint, region_name="us-east-1",
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip
        self.bucket = f"bucket-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=self.bucket)
        self.place = {"Bucket": self.bucket, "Key": "out/_resfeat/locks/all"}

    def write(self, **fields):
        content = json.dumps({**OTHER, **fields}).encode()
        self.client.put_object(**self.place, Body=content)

    def remove(self):
        self.client.delete_object(**self.place)

    def read(self):
        """What is in the lock; None where there is none."""
        try:
            return json.loads(self.client.get_object(**self.place)["Body"].read())
        except self.client.exceptions.NoSuchKey:
            return None

    @contextmanager
    def beating(self):
        """While this lasts, a run on the other machine holds the lock."""
        ended = threading.Event()

        def beat():
            count = 0
            while not ended.wait(BEAT):
                count += 1
                self.write(beat=count)

        self.write()
        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@pytest.fixture
def elsewhere(server):
    return Elsewhere(server)


@pytest.fixture
def layout(proxy, elsewhere):
    return Layout(f"s3://{elsewhere.bucket}/out")


def test_a_lock_says_who_writes_beats_and_is_gone_afterwards(layout, elsewhere):
    with run_lock(layout) as lock:
        first = elsewhere.read()
        assert (first["host"], first["pid"]) == (os.uname().nodename, os.getpid())
        assert holder(layout).startswith(f"process {os.getpid()} on {first['host']} since 20")
        time.sleep(4 * BEAT)
        later = elsewhere.read()
        assert later.pop("beat") > first.pop("beat") and later == first
        lock.check()
    assert lock.killed is None
    assert elsewhere.read() is None
    assert holder(layout) is None


def test_a_lock_that_another_host_keeps_beating_is_refused_by_name(layout, elsewhere):
    with (
        elsewhere.beating(),
        pytest.raises(ResfeatError, match=f"^{layout.root} is being .*process 7 on elsewhere"),
        run_lock(layout),
    ):
        pass
    assert elsewhere.read()["token"] == "0123"  # untouched


def test_a_lock_that_another_host_left_is_stale_after_a_while(layout, elsewhere):
    elsewhere.write()
    began, told = time.monotonic(), []
    with run_lock(layout, on_wait=told.append) as lock:
        assert time.monotonic() - began >= STALE
        assert len(told) == 1 and "process 7 on elsewhere" in told[0]
        assert lock.killed.host == "elsewhere"
        assert elsewhere.read()["host"] == os.uname().nodename


def test_a_lock_that_its_holder_gives_up_while_we_watch_is_free(layout, elsewhere, monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 60)
    elsewhere.write()
    threading.Timer(0.5, elsewhere.remove).start()
    with run_lock(layout) as lock:
        assert elsewhere.read()["host"] == os.uname().nodename
    assert lock.killed is None  # it ended in order


def test_a_lock_of_a_process_of_this_host_that_ended_is_free_at_once(
    layout, elsewhere, monkeypatch
):
    monkeypatch.setattr(locks, "STALE_SECONDS", 60)
    # Our process id, and another beginning: it was given out again.
    elsewhere.write(machine=locks._machine(), pid=os.getpid())
    assert holder(layout) is None
    began = time.monotonic()
    with run_lock(layout) as lock:
        assert lock.killed.pid == os.getpid()
    assert time.monotonic() - began < 20


def test_a_lock_that_says_nothing_is_free(layout, elsewhere):
    for content in (b"", b"half of {", b'"a"', b"\xff\xfe"):
        elsewhere.client.put_object(**elsewhere.place, Body=content)
        assert holder(layout) is None
        with run_lock(layout):
            assert elsewhere.read()["pid"] == os.getpid()


def test_the_later_of_two_that_begin_at_once_has_it(layout, elsewhere, monkeypatch):
    write = locks._write

    def overtaken(*args):
        write(*args)
        elsewhere.write()

    monkeypatch.setattr(locks, "_write", overtaken)
    with pytest.raises(ResfeatError, match="process 7 on elsewhere"), run_lock(layout):
        pass
    assert elsewhere.read()["token"] == "0123"


def test_who_was_overtaken_hears_of_it_and_leaves_the_lock_to_the_other(layout, elsewhere):
    with (
        pytest.raises(ResfeatError, match=f"another run took {layout.root} over"),
        run_lock(layout) as lock,
    ):
        lock.check()
        elsewhere.write()
        time.sleep(3 * BEAT)
        lock.check()
    assert elsewhere.read()["token"] == "0123"


def test_who_was_overtaken_at_the_very_end_leaves_the_lock_to_the_other(layout, elsewhere):
    with run_lock(layout):
        elsewhere.write()  # and no beat comes between
    assert elsewhere.read()["token"] == "0123"


def test_beats_that_are_lost_for_a_while_do_not_end_a_run(layout, elsewhere, proxy, monkeypatch):
    monkeypatch.setattr(stores, "ATTEMPTS", 1)
    with run_lock(layout) as lock:
        proxy.faults = lambda method, _: "403" if method == "PUT" else None
        time.sleep(3 * BEAT)
        proxy.faults = ()
        beat = elsewhere.read()["beat"]
        time.sleep(4 * BEAT)
        assert elsewhere.read()["beat"] > beat
        lock.check()
    assert any(fault for *_, fault in proxy.requests)


@pytest.fixture
def here(tmp_path):
    """A dataset on a disk, and the same for another run that writes another share of it."""
    mine, other = Layout(tmp_path), Layout(tmp_path, share="other")
    for layout in (mine, other):
        for folder in layout.folders:
            folder.mkdir(parents=True, exist_ok=True)
    return mine, other


def test_a_run_that_was_killed_is_told_of_once_and_a_repair_leaves_word_of_it(here):
    layout, _ = here
    killed = locks.Writer.me()
    layout.lock.write_text(json.dumps(asdict(killed)))
    with run_lock(layout, is_run=False) as lock:
        assert lock.killed == killed
    with run_lock(layout) as lock:
        assert lock.killed == killed
    with run_lock(layout) as lock:
        assert lock.killed is None


def test_a_run_leaves_the_drafts_of_another_share_alone(here):
    mine, other = here
    other.tmp.mkdir(parents=True, exist_ok=True)
    (other.tmp / "draft").touch()
    _tidy(mine)
    assert (other.tmp / "draft").exists()
    _tidy(other)
    assert not (other.tmp / "draft").exists()


def test_runs_on_two_shares_hold_a_lock_each(here):
    layout, other = here
    with run_lock(layout), run_lock(other):
        refused = pytest.raises(ResfeatError, match=f"written by process {os.getpid()}")
        with refused, run_lock(other):
            pass
        assert holder(layout) and holder(other)
    assert not holder(layout)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_by_name(number, here, monkeypatch):
    """Lustre, where it is mounted without flock."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    layout, _ = here
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    kind = file_system_of(layout.lock)
    message = f"{layout.lock} is on {kind}, which has no file locks.* mount it with flock"
    with pytest.raises(ResfeatError, match=message), run_lock(layout):
        pass
    assert re.fullmatch("[a-z0-9.]+", kind) and kind != file_system_of(Path("/proc/self"))
