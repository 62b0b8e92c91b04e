"""Who gets which shard, and what becomes of it when a worker dies: plain objects, no worker."""

import time
from dataclasses import replace

import pytest

from resfeat.engines.pool import Member, Pool
from resfeat.errors import ResfeatError
from resfeat.plan import Shard
from resfeat.worker import Task

SHARDS = [Shard(number, "plan-00000.parquet", number, 10) for number in range(8)]


def take(pool, first, last, suspect=None):
    pool.take([Task(shard, shard.number == suspect) for shard in SHARDS[first:last]])


def pool_of(names, shards, suspect=None):
    pool = Pool([Member(name, live=True) for name in names])
    take(pool, 0, shards, suspect)
    return pool


def given(pool):
    """Who is handed what now, and which of it in careful mode."""
    handed = list(pool.hand_out())
    careful = [task.shard.number for _, task in handed if task.careful]
    return [(member.actor, task.shard.number) for member, task in handed], careful


def numbers(member):
    return [shard.number for shard in member.in_hand]


def test_the_emptiest_live_worker_is_given_the_next_shard():
    pool = pool_of("abc", 8, suspect=3)
    _, b, c = pool.members
    b.live = False
    assert given(pool) == ([("a", 0), ("c", 1), ("a", 2), ("c", 3)], [3])
    pool.done(c, SHARDS[1])
    b.live = True
    assert given(pool) == ([("b", 4)], [])
    assert given(pool) == ([], [])


def test_a_shard_takes_from_when_its_worker_had_it_or_was_done_with_the_one_before():
    pool = pool_of("a", 4)
    (a,) = pool.members
    time.sleep(0.05)  # until it has one, a worker does nothing
    begun = time.monotonic()
    given(pool)
    time.sleep(0.02)
    between = time.monotonic()
    assert 0.02 <= pool.done(a, SHARDS[0]) <= time.monotonic() - begun
    assert 0 <= pool.done(a, SHARDS[1]) <= time.monotonic() - between


def test_a_dead_workers_shards_go_to_the_idle_at_once_and_first():
    pool = pool_of("abc", 8)
    given(pool)
    a, b, c = pool.members
    for member in (b, c):
        for shard in list(member.in_hand):
            pool.done(member, shard)
    pool.died(a, "killed")
    assert numbers(a) == [] and not a.live
    assert given(pool) == ([("b", 0), ("c", 3), ("b", 5)], [0, 3])
    assert pool.deaths == 1


def time_taken(pool, speeds):
    """Until all is done, if each worker does its oldest shard first, at its own speed."""
    now, free = 0.0, dict.fromkeys(pool.members, 0.0)
    ends = []
    while pool.busy:
        for member, task in pool.hand_out():
            free[member] = max(now, free[member]) + 1 / speeds[member.actor]
            ends.append((free[member], member, task.shard))
        now, member, shard = min(ends, key=lambda end: end[0])
        ends.remove((now, member, shard))
        pool.done(member, shard)
    return now


def test_no_slow_worker_sits_on_the_last_shards():
    """Of 8 shards it does the two that it has at the start, in 6 units of time; a third that it had
    in hand meanwhile would take until 9."""
    speeds = {"fast": 1.0, "slow": 1 / 3}
    assert time_taken(pool_of(speeds, 8), speeds) == 6.0


def test_the_run_has_ended_when_every_shard_is_done():
    pool = pool_of("a", 3)
    (a,) = pool.members
    for number, left in ((0, True), (1, True), (2, False)):
        given(pool)
        pool.done(a, SHARDS[number])
        assert pool.unfinished is pool.busy is left
    take(pool, 3, 6)
    given(pool)
    pool.drain()
    assert pool.busy and given(pool) == ([], [])
    pool.done(a, SHARDS[3])
    pool.done(a, SHARDS[4])
    assert not pool.busy and pool.unfinished


def test_the_oldest_shard_in_hand_is_blamed():
    """A worker always dies with the same shard in hand, each time beside a younger one."""
    pool = pool_of("a", 4)
    (a,) = pool.members
    for beside in ([0, 1], [0, 1]):
        given(pool)
        assert numbers(a) == beside
        pool.died(a, "killed")
        a.live = True
    given(pool)
    with pytest.raises(ResfeatError, match="3 workers died while doing shard 0: no memory; give"):
        pool.died(a, "no memory; give more")


def test_an_innocent_shard_beside_a_killer_is_not_blamed():
    """The killer is the younger of the two in hand, so the older one is blamed twice; then each of
    them is done alone."""
    pool = pool_of("ab", 6)
    a, b = pool.members
    b.live = False
    for _ in range(2):
        given(pool)
        assert numbers(a) == [0, 1]
        pool.died(a, "killed")
        a.live = True
    assert given(pool) == ([("a", 0)], [0])
    assert given(pool) == ([], [])
    b.live = True  # who has nothing in hand, and may have two
    assert given(pool) == ([("b", 1), ("b", 2)], [1])
    pool.done(a, SHARDS[0])
    assert given(pool) == ([("a", 3)], [])


def test_a_shard_on_its_last_attempt_waits_until_a_worker_has_nothing_else():
    pool = pool_of("ab", 4)
    a, b = pool.members
    b.live = False
    for _ in range(2):
        given(pool)
        pool.died(a, "killed")
        a.live = True
    pool.drain()
    take(pool, 5, 6)
    assert given(pool) == ([("a", 5)], [])
    take(pool, 0, 2)
    assert given(pool) == ([], [])
    pool.done(a, SHARDS[5])
    assert given(pool) == ([("a", 0)], [])


def test_a_preempted_machine_costs_its_shards_nothing():
    pool = pool_of("a", 2)
    (a,) = pool.members
    for _ in range(4):
        assert given(pool) == ([("a", 0), ("a", 1)], [])
        pool.died(a, "preempted", preempted=True)
        a.live = True
    assert pool.deaths == 4


def test_what_a_death_costs_is_counted_from_the_last_shard_that_was_finished(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: now)
    now, pool = 100.0, pool_of("ab", 6)
    a, b = pool.members
    given(pool)
    now = 107.0
    pool.done(a, SHARDS[0])
    given(pool)
    now = 110.0
    pool.died(a, "killed")
    assert (pool.deaths, pool.losses()["lost_seconds"]) == (1, 3.0)
    for shard in list(b.in_hand):
        pool.done(b, shard)
    now = 150.0
    pool.died(b, "idle, it loses nothing")
    assert (pool.deaths, pool.losses()["lost_seconds"]) == (2, 3.0)
    a.live, now = True, 160.0
    given(pool)
    now = 161.5
    pool.died(a, "killed")
    assert (pool.deaths, pool.losses()["lost_seconds"]) == (3, 4.5)


def test_a_worker_that_dies_idle_costs_no_shard():
    pool = pool_of("ab", 2)
    b = pool.members[1]
    for _ in range(4):
        pool.died(b, "killed")
        assert pool.counts()[2] == 1
        b.live = True
    assert given(pool) == ([("a", 0), ("b", 1)], [])


def test_a_worker_that_dies_while_it_starts_is_no_death():
    """Ray starts it again, and says so if it cannot."""
    pool = pool_of("ab", 2)
    pool.members[1].live = False
    pool.died(pool.members[1], "killed")
    assert pool.deaths == 0


def test_a_worker_that_is_silent_for_a_moment_keeps_its_shards_and_is_given_no_others():
    pool = pool_of("ab", 6)
    a, b = pool.members
    given(pool)
    a.process, a.silent = "one", "connection reset"
    pool.done(b, SHARDS[1])
    pool.done(b, SHARDS[3])
    assert given(pool) == ([("b", 4), ("b", 5)], []) and pool.counts()[2] == 1
    asked = pool.answers(a, "one")
    assert [(task.shard.number, task.careful) for task in asked] == [(0, False), (2, False)]
    assert numbers(a) == [0, 2] and a in pool.live and pool.deaths == 0


def test_a_death_that_is_told_many_times_counts_once():
    """First as unavailable, then as died or by the process that has come in its place."""
    pool = pool_of("a", 4)
    (a,) = pool.members
    for number in range(2):
        assert given(pool)[0] == [("a", 0), ("a", 1)]
        a.silent = "connection reset"
        if number:
            pool.died(a, "restarting")
            pool.died(a, "restarting")
        assert pool.answers(a, f"process {number}") == []
        assert pool.deaths == number + 1 and a.live
    assert given(pool) == ([("a", 0)], [0])
    a.silent = "connection reset"
    with pytest.raises(ResfeatError, match="3 workers died while doing shard 0: connection reset"):
        pool.answers(a, "process 2")


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_when_the_first_of_the_shards_in_hand_is_done_at_the_earliest(clock):
    """Ten images a shard. Until a worker has gone on from where it was first heard of, its speed is
    not known; what it then took for one image, it may have taken for `at_once` more."""
    pool = pool_of("ab", 5)
    given(pool)
    a, b = pool.members
    for clock[0], done in (0, 0), (30, 2), (40, 2):
        pool.heard(a, {SHARDS[0]: (done, 0)})
        assert pool.soonest(0) is None
    pool.heard(b, {SHARDS[1]: (1, 0)})
    clock[0] = 50
    pool.heard(a, {SHARDS[0]: (4, 0)})
    assert pool.soonest(0) is None  # b may be quicker, and is not
    clock[0] = 70
    pool.heard(b, {SHARDS[1]: (2, 0), SHARDS[3]: (1, 0)})
    clock[0] = 80
    assert pool.soonest(0) == 50 + 6 * 10 - 80
    assert pool.soonest(8) == 50 + 6 * 2 - 80
    pool.done(a, SHARDS[0])
    assert pool.soonest(0) is None
    pool.died(a, "killed")
    assert pool.soonest(0) == 70 + 8 * 30 - 80
    pool.died(b, "killed")
    assert pool.soonest(0) is None


def test_what_a_dead_worker_had_done_is_not_counted_twice():
    pool = pool_of("ab", 5)
    a, b = pool.members
    given(pool)
    pool.heard(a, {SHARDS[0]: (4, 1), SHARDS[2]: (2, 0)})
    pool.heard(b, {SHARDS[1]: (3, 0), SHARDS[0]: (9, 9)})
    assert pool.counts() == (9, 1, 2)
    pool.died(a, "killed")
    assert pool.counts() == (3, 0, 1)
    given(pool)
    assert numbers(b) == [1, 0]
    pool.heard(b, {SHARDS[1]: (5, 2), SHARDS[0]: (1, 0)})
    assert pool.counts() == (6, 2, 1)
    pool.done(b, SHARDS[1])
    assert pool.counts() == (1, 0, 1)


def finish(pool, member):
    """It is done with its oldest shard."""
    pool.done(member, next(iter(member.in_hand)))


def quick_and_slow(clock, generation=0, **how):
    """Of six shards of ten images one worker has done four, an image a second, and is idle; the
    other has still the two that it began with."""
    pool = Pool([Member("slow", live=True), Member("quick", live=True)])
    shards = [replace(shard, generation=generation) for shard in SHARDS[:6]]
    pool.take([Task(shard, **how) for shard in shards])
    slow, quick = pool.members
    given(pool)
    for clock[0] in (10, 20, 30, 40):
        finish(pool, quick)
        given(pool)
    assert not quick.in_hand and numbers(slow) == [0, 2]
    return pool, quick, slow


def test_an_idle_worker_takes_over_what_a_slow_one_has_let_go_of(clock):
    pool, quick, slow = quick_and_slow(clock)
    pool.heard(slow, {SHARDS[0]: (2, 0)})
    assert list(pool.too_slow(0)) == [(slow, SHARDS[2])]
    assert list(pool.too_slow(0)) == [] and given(pool) == ([], [])  # until it has let go
    pool.let_go(slow, SHARDS[2])
    assert given(pool) == ([("quick", 2)], []) and pool.losses()["taken_over"] == 1
    clock[0] = 50
    finish(pool, quick)
    # Of the one that it is at 8 images are left, for which it needs 200 s, or 12 if it has done 32
    # more than it has told: that is not twice what the other needs.
    assert list(pool.too_slow(32)) == []
    assert list(pool.too_slow(0)) == [(slow, SHARDS[0])]
    pool.let_go(slow, SHARDS[0])
    assert given(pool) == ([("quick", 0)], [])
    finish(pool, quick)
    assert not pool.unfinished and pool.losses()["taken_over"] == 2


def test_what_was_not_let_go_of_in_time_stays_where_it_is(clock):
    """Its commit was under way, or it died of something else."""
    pool, _, slow = quick_and_slow(clock)
    pool.heard(slow, {SHARDS[0]: (2, 0)})
    assert list(pool.too_slow(0)) == [(slow, SHARDS[2])]
    finish(pool, slow)
    pool.died(slow, "killed")
    assert given(pool) == ([("quick", 2)], [2]) and pool.losses()["taken_over"] == 0


def test_a_shard_changes_hands_once_and_comes_back_only_where_nobody_else_is_left(clock):
    pool, quick, slow = quick_and_slow(clock)
    pool.heard(slow, {SHARDS[0]: (2, 0)})
    list(pool.too_slow(0))
    pool.let_go(slow, SHARDS[2])
    finish(pool, slow)
    given(pool)
    clock[0] = 1000  # and now the quick one is slow
    assert numbers(quick) == [2] and not slow.in_hand
    assert list(pool.too_slow(0)) == []
    pool.died(quick, "killed")
    assert given(pool) == ([("slow", 2)], [2])


def test_how_long_the_next_will_take_is_told_from_when_the_one_before_it_was_let_go_of(clock):
    pool, _, slow = quick_and_slow(clock)
    pool.let_go(slow, SHARDS[0])
    clock[0] = 42
    pool.heard(slow, {SHARDS[2]: (1, 0)})
    assert slow.seconds_left(SHARDS[2], 0) == 9 * 2


@pytest.mark.parametrize("why", ["waiting", "drained", "nobody is idle", "silent", "unknown"])
def test_nothing_is_taken_from_a_slow_worker(why, clock):
    pool, quick, slow = quick_and_slow(clock)
    if why == "waiting":
        take(pool, 6, 7)
    elif why == "drained":
        pool.drain()
    elif why == "nobody is idle":
        take(pool, 6, 7)
        given(pool)
    elif why == "silent":
        slow.silent = "connection reset"
    else:
        quick.pace = None  # it has not done one yet
    assert list(pool.too_slow(16)) == []


@pytest.mark.parametrize("about", [{"retry": True}, {"generation": 1}, {"careful": True}])
def test_nothing_is_taken_where_rows_may_stay_or_images_are_decoded_with_care(about, clock):
    """How long such a shard has taken says nothing of how long it, or another, will."""
    pool, quick, _ = quick_and_slow(clock, **about)
    assert quick.pace is None
    quick.pace = 1.0
    clock[0] = 1000
    assert list(pool.too_slow(16)) == []
