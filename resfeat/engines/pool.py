"""Which shard is in whose hands. It calls no worker and knows nothing of Ray."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from resfeat.engines import DRAIN_SECONDS
from resfeat.errors import ResfeatError
from resfeat.plan import Shard
from resfeat.worker import SHARDS_IN_HAND, Task

# A shard that costs so many workers is taken to be what kills them.
ATTEMPTS = 3
# What it takes until a worker has let go of a shard and another has begun with it, at most.
HAND_OVER_SECONDS = 2.0


@dataclass(eq=False)
class Member:
    """One worker, as the driver sees it."""

    actor: Any  # what the engine calls
    live: bool = False  # whether it has built its model
    process: str = ""  # which one it was when it last said so: another is one that died and is new
    since: float = 0.0  # when it last finished a shard, or was given one while it had none
    pace: float | None = None  # seconds that an image of the last shard took which it finished
    silent: str = ""  # why, while it does not answer and nobody knows whether it has died
    # Images done and failed so far, as last heard, of each of its shards; the oldest comes first.
    in_hand: dict[Shard, tuple[int, int]] = field(default_factory=dict)
    # When it first and last told of more images of its oldest shard, and how many those were.
    news: list[tuple[float, int]] = field(default_factory=list)

    def hear(self) -> None:
        """Note when more of its oldest shard is done than was known."""
        done = next(iter(self.in_hand.values()))[0] if self.in_hand else 0
        if done > (self.news[-1][1] if self.news else 0):
            self.news[1:] = [(time.monotonic(), done)]

    def earliest_end(self, at_once: int) -> float | None:
        """When its oldest shard is done, if it goes on as fast as it has gone at most; None if that
        is not known yet. It is slow to begin, and many images may end at once: `at_once`."""
        if len(self.news) < 2:
            return None
        (first, before), (last, done) = self.news
        left = next(iter(self.in_hand)).rows - done
        return last + left * (last - first) / (done - before + at_once)

    def seconds_left(self, shard: Shard, at_once: int) -> float:
        """How long it will need until this one of its shards is done, at least, if it goes on as it
        has since it began with its oldest. at_once: as of `earliest_end`."""
        done = next(iter(self.in_hand.values()))[0]
        until = list(self.in_hand)[: list(self.in_hand).index(shard) + 1]
        left = sum(each.rows for each in until) - done
        return left * (time.monotonic() - self.since) / (done + at_once)


class Pool:
    """Hands shards to workers, and takes them back from workers that died."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.deaths = 0  # workers that died while they were live
        self.lost_seconds = 0.0  # what they had worked on shards that others did again
        self._waiting: deque[Shard] = deque()
        self._tasks: dict[Shard, Task] = {}
        self._blamed: Counter[Shard] = Counter()
        self._slow: dict[Shard, Member] = {}  # shards that this worker was to let go of
        self.taken_over = 0  # those of which it did
        self._give_up: float | None = None

    def take(self, tasks: Sequence[Task]) -> None:
        """Take on these tasks, each of another shard."""
        self._waiting.extend(task.shard for task in tasks)
        self._tasks.update((task.shard, task) for task in tasks)

    def drain(self) -> bool:
        """Hand out nothing that waits. Gives whether what is in hand has had its time to finish."""
        self._waiting.clear()
        self._give_up = self._give_up or time.monotonic() + DRAIN_SECONDS
        return time.monotonic() > self._give_up

    @property
    def live(self) -> list[Member]:
        return [member for member in self.members if member.live and not member.silent]

    @property
    def busy(self) -> bool:
        """Whether a shard is waiting or in hand."""
        return bool(self._waiting) or any(member.in_hand for member in self.members)

    @property
    def unfinished(self) -> bool:
        """Whether a shard is not done; it may have been dropped."""
        return bool(self._tasks)

    def hand_out(self) -> Iterator[tuple[Member, Task]]:
        """Put shards into the hands of live workers that have room, the emptiest first."""
        for others in range(SHARDS_IN_HAND):
            for member in self.live:
                if self._waiting and self._has_room(member, others):
                    shard = self._waiting.popleft()
                    if not member.in_hand:
                        member.since = time.monotonic()
                    member.in_hand[shard] = (0, 0)
                    yield member, self._tasks[shard]

    def _has_room(self, member: Member, others: int) -> bool:
        """Whether a worker may have the next shard beside at most `others`."""
        live = len(self.live)
        if self._slow.get(self._waiting[0]) is member and live > 1:
            return False
        every = [*member.in_hand, self._waiting[0]]
        # A shard whose next death ends the run is done alone, so that the right one is blamed.
        if any(self._blamed[shard] == ATTEMPTS - 1 for shard in every):
            return not member.in_hand
        # The last shards wait for whoever is free first: no slow worker sits on one.
        if member.in_hand and 1 < live >= len(self._waiting):
            return False
        return len(member.in_hand) <= others

    def done(self, member: Member, shard: Shard) -> float:
        """Gives the seconds that it took the worker, as of `ShardResult`."""
        now = time.monotonic()
        took = now - member.since
        if self._is_usual(shard):
            member.pace = took / shard.rows
        del member.in_hand[shard]
        del self._tasks[shard]
        member.since = now
        member.news.clear()
        return took

    def too_slow(self, at_once: int) -> Iterator[tuple[Member, Shard]]:
        """Shards that workers are to let go of, once nothing waits: idle ones will do them in half
        of the time that is left. Each is named once a run, so that none goes to and fro."""
        if self._waiting or self._give_up:
            return
        idle = [each.pace for each in self.live if each.pace is not None and not each.in_hand]
        coming = sum(shard in member.in_hand for shard, member in self._slow.items())
        for pace in sorted(idle)[coming:]:
            last = [
                (member, stays[-1])
                for member in self.live
                if (stays := [each for each in member.in_hand if each not in self._slow])
                and self._is_usual(stays[-1])
            ]
            if not last:
                return
            member, shard = max(last, key=lambda each: each[0].seconds_left(each[1], at_once))
            other = pace * shard.rows + HAND_OVER_SECONDS
            if member.seconds_left(shard, at_once) <= 2 * other:
                return
            self._slow[shard] = member
            yield member, shard

    def let_go(self, member: Member, shard: Shard) -> None:
        """A worker has left a shard as it was: the next is anybody else's."""
        if shard == next(iter(member.in_hand)):
            member.since = time.monotonic()
            member.news.clear()
        del member.in_hand[shard]
        self._waiting.appendleft(shard)
        self.taken_over += 1

    def _is_usual(self, shard: Shard) -> bool:
        """Whether another one would take about as long: not with care, which goes by its own."""
        return self._is_even(shard) and not self._tasks[shard].careful

    def _is_even(self, shard: Shard) -> bool:
        """Whether its images take their time: rows that stay pass at once, and nobody knows which
        those are."""
        return not (self._tasks[shard].retry or shard.generation)

    def heard(self, member: Member, told: Mapping[Shard, tuple[int, int]]) -> None:
        """A worker has told how many images of its shards it has done, and how many failed."""
        member.in_hand.update((shard, told[shard]) for shard in member.in_hand if shard in told)
        member.hear()

    def counts(self) -> tuple[int, int, int]:
        """Images done and failed in shards in hand, as last heard, and how many workers live."""
        heard = [counts for member in self.members for counts in member.in_hand.values()]
        return sum(n for n, _ in heard), sum(failed for _, failed in heard), len(self.live)

    def soonest(self, at_once: int) -> float | None:
        """Seconds until the first of the shards in hand is done, at the earliest; None while that
        is not known of a live worker. at_once: images that one may tell of at a time."""
        busy = [member for member in self.live if member.in_hand]
        if not all(self._is_even(next(iter(member.in_hand))) for member in busy):
            return None
        ends = [member.earliest_end(at_once) for member in busy]
        known = [end for end in ends if end is not None]
        return min(known) - time.monotonic() if known and len(known) == len(ends) else None

    def losses(self) -> dict[str, float]:
        """What was begun and done again by others so far, for the report."""
        lost = round(self.lost_seconds, 1)
        return {"worker_deaths": self.deaths, "lost_seconds": lost, "taken_over": self.taken_over}

    def answers(self, member: Member, process: str) -> list[Task]:
        """A worker says that it is there, and which process it is. Gives what it still has in hand,
        to be asked for once more: the answers were lost on the way."""
        if member.live and process != member.process:
            self.died(member, member.silent)
        member.live, member.process, member.silent = True, process, ""
        return [self._tasks[shard] for shard in member.in_hand]

    def died(self, member: Member, reason: str, *, preempted: bool = False) -> None:
        """A worker is gone: its shards go to the front of the queue, to be done in careful mode.

        The oldest of them, the likeliest reason, is blamed; none if the machine was preempted.
        Raises ResfeatError if a shard has cost too many. reason: with what can be done about it.
        """
        self.deaths += member.live
        member.live, member.silent = False, ""
        shards = list(member.in_hand)
        if shards:
            self.lost_seconds += time.monotonic() - member.since
        member.in_hand.clear()
        member.news.clear()
        self._waiting.extendleft(reversed(shards))
        if preempted or not shards:
            return
        self._tasks.update((shard, replace(self._tasks[shard], careful=True)) for shard in shards)
        self._blamed[shards[0]] += 1
        if self._blamed[shards[0]] >= ATTEMPTS:
            raise ResfeatError(f"{ATTEMPTS} workers died while doing shard {shards[0]}: {reason}")
