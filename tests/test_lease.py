"""The lock of a dataset in a store: a lease, with a heart that beats faster.

The last test is the one that counts: whatever the network does, never two holders at once.
"""

import itertools
import json
import os
import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import pytest
from azure import AzureStore, azurite, environment
from contenders import Contenders, hurry
from object_store import Endpoint, FaultyProxy, ObjectStore
from PIL import Image

from resfeat import ExtractSpec, RuntimeOptions, extract
from resfeat.dataset import Layout, check_lease, lease, whole
from resfeat.dataset.lock import holder, run_lock
from resfeat.dataset.writer import HeldError, Writer, _machine
from resfeat.errors import ResfeatError, Stopped, StoreError
from resfeat.storage import remote as stores
from resfeat.worker import worker

BEAT, LEASE, STALE = 0.2, 1.0, 1.5
# As no lease is renewed while a test lasts, but by a check.
NEVER = 60.0

OTHER = {
    "host": "elsewhere", "machine": "another", "pid": 7, "began": "1", "token": "0123",
    "started": "2020-01-01T00:00:00+00:00",
}  # fmt: skip
IMAGES = 40
TAKEN = "^another run took .* over, .* let that one finish$"


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as server:
        yield server


@pytest.fixture
def proxy(server, monkeypatch):
    times = {"BEAT": BEAT, "LEASE": LEASE, "STALE": STALE, "LOOK": 0.1}
    for name, seconds in times.items():
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)
    with FaultyProxy(server.endpoint) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        stores.store.cache_clear()
        yield proxy
    stores.store.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """A lease that lasts a minute by a clock that is put forward: `clock(0.5)` is half of that."""
    now, passed = lease._now, [0.0]
    monkeypatch.setattr(lease, "LEASE_SECONDS", NEVER)
    monkeypatch.setattr(lease, "_now", lambda: now() + NEVER * sum(passed))
    return passed.append


def until(condition):
    """Wait for what comes after a beat or two, on a busy machine later."""
    given_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < given_up, "it does not come"
        time.sleep(0.02)


class Elsewhere:
    """The dataset as another machine sees it."""

    def __init__(self, server):
        self.client = server.client()
        self.bucket = f"bucket-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=self.bucket)

    def put(self, content, name="_resfeat/locks/all"):
        self.client.put_object(Bucket=self.bucket, Key=f"out/{name}", Body=content)

    def get(self, name="_resfeat/locks/all"):
        found = self.client.get_object(Bucket=self.bucket, Key=f"out/{name}")
        return found["Body"].read()

    def write(self, **fields):
        """Another takes the lock, however it came to that."""
        self.put(json.dumps({**OTHER, "beat": uuid.uuid4().hex, **fields}).encode())

    def remove(self):
        self.client.delete_object(Bucket=self.bucket, Key="out/_resfeat/locks/all")

    def read(self):
        return json.loads(self.get())

    def names_nobody(self):
        return Writer.parse(self.get()) is None

    def names(self):
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ())
        return [each["Key"].removeprefix("out/") for each in found]

    @contextmanager
    def beating(self, **fields):
        """While this lasts, a run on the other machine holds the lock."""
        ended = threading.Event()

        def beat():
            while not ended.wait(BEAT):
                self.write(**fields)

        self.write(**fields)
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


def test_who_holds_a_lease_stops_trusting_it_before_another_may_take_it():
    """By the real times, where all other tests hurry; and two renewals may be lost."""
    assert 2 * lease.BEAT_SECONDS < lease.LEASE_SECONDS < lease.STALE_SECONDS


def test_a_lock_says_who_writes_beats_and_names_nobody_afterwards(layout, elsewhere):
    with run_lock(layout) as lock:
        first = elsewhere.read()
        assert (first["host"], first["pid"]) == (os.uname().nodename, os.getpid())
        assert holder(layout).startswith(f"process {os.getpid()} on {first['host']} since 20")
        until(lambda: elsewhere.read()["beat"] != first["beat"])
        assert {**elsewhere.read(), "beat": None} == {**first, "beat": None}
        lock.check()
    assert lock.killed is None and not lock.is_held()
    with pytest.raises(ResfeatError, match=r"^the run has given s3://.*/out up: nothing more is"):
        lock.check()
    assert elsewhere.names_nobody()
    assert holder(layout) is None


def test_nothing_that_was_in_the_lock_comes_back(layout, elsewhere):
    """S3's version of an object is a digest: the same content would be an old version again."""
    seen = []
    for is_run in (True, True, False, False):
        with run_lock(layout, is_run=is_run):
            seen.append(elsewhere.get())
        seen.append(elsewhere.get())
        elsewhere.write(machine=_machine(), pid=os.getpid())  # who is gone
    assert len(set(seen)) == len(seen)


def test_a_lock_that_another_host_keeps_beating_is_refused_by_name(layout, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", NEVER)  # however late a beat is
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


@pytest.mark.parametrize("left", ["nobody", "removed"])
def test_a_lock_that_its_holder_gives_up_while_we_watch_is_free(
    left, layout, elsewhere, monkeypatch
):
    monkeypatch.setattr(lease, "STALE_SECONDS", NEVER)
    elsewhere.write()
    give_up = elsewhere.remove if left == "removed" else partial(elsewhere.put, b"{}")
    threading.Timer(0.5, give_up).start()
    with run_lock(layout) as lock:
        assert elsewhere.read()["host"] == os.uname().nodename
    assert lock.killed is None  # it ended in order


def test_a_lock_of_a_process_of_this_host_that_ended_is_free_at_once(
    layout, elsewhere, monkeypatch
):
    monkeypatch.setattr(lease, "STALE_SECONDS", NEVER)
    # Our process id, and another beginning: it was given out again.
    elsewhere.write(machine=_machine(), pid=os.getpid())
    assert holder(layout) is None
    began = time.monotonic()
    with run_lock(layout) as lock:
        assert lock.killed.pid == os.getpid()
    assert time.monotonic() - began < 20


def test_a_lock_that_says_nothing_is_free(layout, elsewhere):
    for content in (b"", b"half of {", b'"a"', b"\xff\xfe", b'{"free": "once"}'):
        elsewhere.put(content)
        assert holder(layout) is None
        with run_lock(layout) as lock:
            assert elsewhere.read()["pid"] == os.getpid()
        assert lock.killed is None


def test_a_repair_leaves_word_of_a_run_that_was_killed(layout, elsewhere):
    elsewhere.write(machine=_machine(), pid=os.getpid(), token="killed")
    for is_run in (False, True):
        with run_lock(layout, is_run=is_run) as lock:
            assert lock.killed.token == "killed"
    with run_lock(layout) as lock:
        assert lock.killed is None


@pytest.mark.parametrize("there", [None, b"", b'{"free": "once"}'])
def test_of_two_that_begin_at_once_the_first_has_it(there, layout, elsewhere, proxy):
    if there is not None:
        elsewhere.put(there)

    def overtake(method, path):
        if method == "PUT":
            elsewhere.write()

    proxy.faults = overtake
    with pytest.raises(ResfeatError, match="process 7 on elsewhere"), run_lock(layout):
        pass
    assert elsewhere.read()["token"] == "0123"


@pytest.mark.parametrize("share", ["all", "2-of-2"])
def test_a_partition_beside_one_that_renews_on_another_host(share, layout, elsewhere, monkeypatch):
    """A run of all is no reason to wait, and for another partition one waits and says so."""
    monkeypatch.setattr(lease, "STALE_SECONDS", NEVER)  # however late a beat is
    told, expected = [], HeldError if share == "all" else Stopped
    mine = Layout(str(layout.root), "1-of-2")
    waits = whole(mine, told.append, lambda: len(told) > 1)
    with elsewhere.beating(share=share), pytest.raises(expected), waits:
        raise AssertionError("two have it")
    assert "looking for 60 s" in told[0]
    assert share == "all" or "waiting for partition 2/2, process 7 on elsewhere" in told[1]


def test_of_two_that_take_over_at_once_the_first_has_it(layout, elsewhere, proxy):
    elsewhere.write(token="dead")
    proxy.faults = lambda method, _: elsewhere.write() if method == "PUT" else None
    with pytest.raises(ResfeatError, match="process 7 on elsewhere"), run_lock(layout):
        pass
    assert elsewhere.read()["token"] == "0123"


def test_who_was_overtaken_hears_of_it_and_leaves_the_lock_to_the_other(layout, elsewhere):
    with pytest.raises(ResfeatError, match=TAKEN), run_lock(layout) as lock:
        lock.check()
        elsewhere.write()
        assert lock.taken.wait(60)  # by a beat
        lock.check()
    assert not lock.is_held()
    assert elsewhere.read()["token"] == "0123"


def test_who_was_overtaken_at_the_very_end_leaves_the_lock_to_the_other(layout, elsewhere):
    with run_lock(layout):
        elsewhere.write()  # and no beat comes between
    assert elsewhere.read()["token"] == "0123"


@pytest.mark.parametrize("taken", [False, True])
def test_who_slept_for_too_long_asks_before_it_goes_on(
    taken, layout, elsewhere, clock, monkeypatch
):
    """As a process does that was paused; `test_never_two_holders` really pauses some."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", NEVER)
    with suppress(ResfeatError), run_lock(layout) as lock:
        before = elsewhere.read()
        clock(0.5)
        lock.check()
        assert elsewhere.read() == before  # it still may trust it
        clock(0.6)
        if taken:
            elsewhere.write()
            with pytest.raises(ResfeatError, match=TAKEN):
                lock.check()
        else:
            lock.check()
            assert elsewhere.read()["beat"] != before["beat"]
    assert (elsewhere.read() if taken else {}).get("token") == (OTHER["token"] if taken else None)


def test_who_cannot_renew_stops_until_it_can(layout, elsewhere, proxy, clock, monkeypatch):
    hurry_up(monkeypatch)
    with run_lock(layout) as lock:
        proxy.down = True
        until(lambda: faults(proxy))
        lock.check()
        clock(1.1)
        with pytest.raises(StoreError, match="give the same command again"):
            lock.check()
        assert not lock.is_held()
        proxy.down = False
        lock.check()  # nobody has come meanwhile
        assert lock.is_held()
    assert elsewhere.names_nobody()


def test_beats_that_are_lost_for_a_while_do_not_end_a_run(layout, elsewhere, proxy, monkeypatch):
    hurry_up(monkeypatch)
    with run_lock(layout) as lock:
        proxy.faults = lambda method, _: "403" if method == "PUT" else None
        until(lambda: len(faults(proxy)) > 2)
        proxy.faults = ()
        beat = elsewhere.read()["beat"]
        until(lambda: elsewhere.read()["beat"] != beat)
        lock.check()


def test_a_renewal_counts_from_when_it_was_sent_however_late_its_answer_is(layout, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", NEVER)
    swap = stores.StorePath.swap

    def late(*given):
        version = swap(*given)
        time.sleep(0.3)
        return version

    with run_lock(layout) as held:
        monkeypatch.setattr(stores.StorePath, "swap", late)
        held._renew()
        assert held._sent <= lease._now() - 0.3


def test_a_renewal_that_arrives_after_it_was_given_up_is_our_own(
    layout, elsewhere, proxy, clock, monkeypatch
):
    hurry_up(monkeypatch)
    monkeypatch.setattr(lease, "BEAT_SECONDS", NEVER)
    arrives = threading.Event()
    with run_lock(layout) as lock:
        before, proxy.delay = elsewhere.read(), lambda: 0 * arrives.wait(60)
        proxy.faults = lambda method, _: "delayed" if method == "PUT" else None
        clock(1.1)
        with pytest.raises(StoreError):
            lock.check()
        assert elsewhere.read() == before
        proxy.faults = ()
        arrives.set()
        until(lambda: elsewhere.read() != before)
        lock.check()
    assert elsewhere.names_nobody()


def faults(proxy):
    return [fault for *_, fault in proxy.requests if fault]


def hurry_up(monkeypatch):
    """Have requests given up soon."""
    for name in ("REQUEST_SECONDS", "RETRY_SECONDS", "ATTEMPTS", "PAUSE_SECONDS"):
        monkeypatch.setattr(stores, name, getattr(stores, name))
    hurry(stores)
    stores.store.cache_clear()


def test_a_worker_writes_only_while_the_lock_names_its_run(layout, elsewhere):
    """In a process of its own, on Ray: of the lease it knows no more than the token."""
    with suppress(ResfeatError), run_lock(layout) as lock:
        worker = Layout(str(layout.root))
        worker.fence.check = partial(check_lease, worker, lock.token)
        worker.fence.write(layout.plan / "one", b"ours")
        elsewhere.write()
        with pytest.raises(ResfeatError, match=TAKEN):
            worker.fence.write(layout.plan / "one", b"late")
        with pytest.raises(ResfeatError, match=TAKEN):
            worker.fence.write(layout.plan / "two", b"late")
    assert elsewhere.get("_resfeat/plan/one") == b"ours"
    assert "_resfeat/plan/two" not in elsewhere.names()


@pytest.mark.parametrize("before", [None, b"older"])
def test_what_is_sent_too_late_replaces_nothing_of_the_next_holder(before, layout, elsewhere):
    """The check passes, then the process sleeps, and the other writes."""
    if before:
        elsewhere.put(before, "spec")
    checks = iter([lambda: elsewhere.put(b"the other's", "spec"), partial(check_lease, layout, "")])
    layout.fence.check = lambda: next(checks)()
    elsewhere.write()
    with pytest.raises(ResfeatError, match=TAKEN):
        layout.fence.write(layout.root / "spec", b"late")
    assert elsewhere.get("spec") == b"the other's"


@pytest.mark.parametrize("before", [None, b"older"])
def test_what_came_too_early_is_written_over(before, layout, elsewhere):
    """What a former holder sent arrives between a look and the write."""
    if before:
        elsewhere.put(before, "spec")
    late = iter([lambda: elsewhere.put(b"late", "spec")])
    layout.fence.check = lambda: next(late, lambda: None)()
    layout.fence.write(layout.root / "spec", b"ours")
    assert elsewhere.get("spec") == b"ours"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(IMAGES):
        Image.effect_noise((40, 40), 60).convert("RGB").save(folder / f"{number:02}.png")
    return folder


def spec(source, layout, **changes):
    small = {"resize": 16, "crop": 16, "model": "cifar_resnet20", "weights": "random:0"}
    return ExtractSpec(
        sources=(str(source),), output=str(layout.root), shard_size=1,
        runtime=RuntimeOptions(workers=0, runtime="torch"), **small | changes,
    )  # fmt: skip


@pytest.mark.parametrize("who", ["the run", "its worker"])
def test_a_run_that_is_overtaken_commits_nothing_more_and_removes_nothing(
    who, source, layout, elsewhere, monkeypatch
):
    """The one by its renewal, the other by a look at the lock before each write."""
    there = []
    if who == "its worker":  # as one whose run sleeps
        monkeypatch.setattr(lease, "BEAT_SECONDS", NEVER)
        monkeypatch.setattr(lease, "LEASE_SECONDS", NEVER)
    else:
        monkeypatch.setattr(worker, "check_lease", lambda layout, token: time.sleep(0.1))

    def overtake(progress):
        if progress.total and progress.done >= 3 and not there:
            elsewhere.write()
            there.extend(elsewhere.names())

    with pytest.raises(ResfeatError, match=TAKEN):
        extract(spec(source, layout), on_progress=overtake)
    assert there and set(there) <= set(elsewhere.names())
    parts = [key for key in elsewhere.names() if key.startswith("embeddings/")]
    known = sum(key.startswith("embeddings/") for key in there)
    # Two were in hand, and may have been checked before.
    assert len(parts) <= (known + 2 if who == "its worker" else IMAGES - 1)
    assert elsewhere.read()["token"] == "0123"


def test_a_run_that_is_overtaken_while_it_lists_leaves_the_plan_of_the_other(
    source, layout, elsewhere, proxy, monkeypatch
):
    """Its own plan is on the way while it is cut off."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", NEVER)
    theirs = {"_resfeat/plan/plan-00000.parquet": b"a plan", "_resfeat/spec.json": b"a record"}

    def overtake(method, path):
        if method == "PUT" and "/plan/" in path:
            proxy.faults = ()
            time.sleep(STALE)
            elsewhere.write()
            for name, content in theirs.items():
                elsewhere.put(content, name)

    proxy.faults = overtake
    with pytest.raises(ResfeatError, match=TAKEN):
        extract(spec(source, layout))
    assert {name: elsewhere.get(name) for name in theirs} == theirs
    assert elsewhere.read()["token"] == "0123"


def test_a_run_that_comes_to_nothing_leaves_a_store_to_the_next_one(
    source, layout, elsewhere, proxy, tmp_path
):
    """Nothing is removed there: the request may come when the next one has written the same."""
    with pytest.raises(ResfeatError, match="no images in"):
        extract(spec(tmp_path, layout))
    assert elsewhere.names() == ["_resfeat/locks/all"] and elsewhere.names_nobody()
    with pytest.raises(ResfeatError, match="under --min-parity 1"):
        extract(spec(source, layout, precision="bf16", min_parity=1))
    (tmp_path / "1.png").write_bytes((source / "01.png").read_bytes())
    assert extract(spec(tmp_path, layout)).embedded == 1  # another listing, too
    assert "DELETE" not in {method for method, *_ in proxy.requests}


def at(endpoint):
    """The environment of an S3 client of this endpoint."""
    place = Endpoint()
    place.endpoint = endpoint
    return place.environment


@pytest.fixture
def s3(server, elsewhere):
    """An endpoint, an address, and the environment in which that is behind another endpoint."""
    return server.endpoint, f"s3://{elsewhere.bucket}", at


@pytest.fixture
def azure():
    if not azurite():
        pytest.skip("azurite is not installed")
    with AzureStore() as server:
        server.make("container")
        yield server.endpoint, "az://container", environment


class Weather:
    """What befalls the writes of the contenders: one rule for all rounds, by chance."""

    FAULTS = ("delayed", "late", "lost", "503", "reset")

    def __init__(self, seed):
        self.chance = random.Random(seed)

    def __call__(self, method, path):
        if method == "PUT" and self.chance.random() < 0.3:
            return self.chance.choice(self.FAULTS)
        return self.chance.choice(("late", "lost", None)) if self.chance.random() < 0.05 else None


def interleave(cloud, rounds, seed):
    """So many rounds on datasets of their own, and on a busy machine more, until all have happened
    that may happen; gives the holds of each."""
    endpoint, address, at = cloud
    with (
        FaultyProxy(endpoint, Weather(seed)) as proxy,
        Contenders(3, at(proxy.endpoint), at(endpoint)) as contenders,
    ):
        proxy.delay = lambda: random.uniform(0, 1.2)  # up to some three leases
        played = []
        while len(played) < rounds or (not is_varied(played) and len(played) < 5 * rounds):
            number = len(played)
            played.append(contenders.play(f"{address}/{seed}/{number}", number))
        return played


def is_varied(played):
    """Whether the lease changed hands, all had it once, and one lost it."""
    holds = list(itertools.chain(*played))
    return (
        len(holds) > len(played)
        and any(hold.lost for hold in holds)
        and {hold.who for hold in holds} == {0, 1, 2}
    )


def check_rounds(played):
    holds = list(itertools.chain(*played))
    for each in played:
        for one, other in itertools.pairwise(each):
            assert one.last < other.first, f"two held it at once: {one}, {other}"
    assert [hold for hold in holds if hold.strange is not None] == []
    assert is_varied(played)


@pytest.mark.parametrize("cloud", ["s3", pytest.param("azure", marks=pytest.mark.more)])
def test_never_two_holders(cloud, request):
    check_rounds(interleave(request.getfixturevalue(cloud), 8, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("cloud", ["s3", "azure"])
def test_never_two_holders_in_a_hundred_rounds(cloud, request):
    play = partial(interleave, request.getfixturevalue(cloud), 50)
    with ThreadPoolExecutor(2) as pool:
        check_rounds(list(itertools.chain(*pool.map(play, (1, 2)))))
