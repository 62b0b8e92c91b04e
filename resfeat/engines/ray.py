"""On Ray: a pool of actors, made once a run.

Each actor builds its model from the network that the driver put into Ray's object store, and has a
few shards in hand. When one dies, its shards go to the others, and Ray starts it again. At the end
an idle one takes over what a slow one has in hand: never before that has let go of it, so that no
shard is in two hands. Actors that find no room stay pending, which makes Ray's autoscaler add
machines.

Ray says "unavailable" of an actor whose process died and of one whose connection broke. So that one
is asked whether it is there: the same process goes on with what it has in hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from resfeat import __version__
from resfeat.backbones.weights import Weights
from resfeat.engines import OnProgress
from resfeat.engines.actor import RayWorker
from resfeat.engines.cluster import POLL_SECONDS, Cluster, last_line
from resfeat.engines.placement import place
from resfeat.engines.pool import ATTEMPTS, Member, Pool
from resfeat.errors import DeviceLostError, ResfeatError, Stopped
from resfeat.plan import Shard
from resfeat.spec import RuntimeOptions
from resfeat.worker import SHARDS_IN_HAND, Job, ShardResult, Task
from resfeat.worker.worker import network_for

# On a cluster a worker may wait for a machine to be added; here there is nothing to wait for.
START_SECONDS = 180.0
# And so long for one that the autoscaler says it cannot add: where there is none, that is said of a
# machine too that is down for a while, or still loads its image.
VAIN_SECONDS = 300.0
# When the user is told that there is still no worker: after so long, then after twice that, and so
# on, but at least every so often.
TELL_SOON_SECONDS, TELL_SECONDS = 4.0, 30.0
MEMORY = "give each more memory (fewer --workers)"


class RayEngine:
    """A pool of Ray actors. close: ends them."""

    def __init__(
        self, options: RuntimeOptions, job: Job, weights: Weights, shards: int, cluster: Cluster
    ) -> None:
        self._step = cluster.step
        self._address = options.address
        cluster.ready()
        workers, resources, self.placement = place(options, job.identity, shards)
        self._resources = resources
        as_actor = ray.remote(concurrency_groups={"shards": SHARDS_IN_HAND, "control": 1})
        how = {"max_restarts": -1, "scheduling_strategy": "SPREAD", **resources}
        with ExitStack() as stack:
            members = []
            for number in range(1, workers + 1):
                # Ray titles a process by its class: this is what `ps` shows, behind "ray::". It has
                # no blank, as the title of the run has none.
                named = type(f"resfeat-worker-{number}", (RayWorker,), {})
                actor = as_actor(named).options(**how).remote(job, self.placement)
                members.append(Member(actor))
                stack.callback(ray.kill, members[-1].actor)
            # While they start. In a list, or Ray would fetch it for each call.
            self._network = [ray.put(network_for(job, self.placement, weights.tensors))]
            self.close = stack.pop_all().close
        self._pool = Pool(members)
        # Every call under way: whose it is, and the shard, or None for `start`.
        self._calls: dict[ray.ObjectRef[Any], tuple[Member, Shard | None]] = {}
        self._asked: dict[ray.ObjectRef[Any], Member] = {}
        for member in members:
            self._start(member)
        self._without_worker: float | None = None
        self._tell_after = 0.0
        self._vain_since: float | None = None  # when the cluster began to say so, and goes on to
        about = {"engine": "ray", "ray": ray.__version__, "address": options.address or "local"}
        counts = {"workers": workers, "reads_ahead": job.reads_ahead}
        self.description: dict[str, Any] = {**about, **counts, **resources, **vars(self.placement)}

    def embed(
        self, pictures: Sequence[NDArray[np.uint8]], stopping: Callable[[], bool]
    ) -> NDArray[np.float32]:
        given, deaths = list(pictures), 0
        while True:
            while not self._pool.live:  # the first that is ready will do
                _check(stopping)
                self._watch()
                list(self._collect())
            member = self._pool.live[0]
            call = member.actor.embed.remote(given, self._network)
            while not ray.wait([call], timeout=POLL_SECONDS)[0]:
                _check(stopping)
            try:
                return ray.get(call)  # type: ignore[no-any-return]
            except RayTaskError as error:
                raise _as_resfeat(error) from error
            except RayError as error:
                deaths += 1
                if deaths >= ATTEMPTS:
                    raise _cannot_start(error) from error
                self._died(member, error)

    def run(
        self, tasks: Sequence[Task], on_progress: OnProgress, stopping: Callable[[], bool]
    ) -> Iterator[ShardResult]:
        pool = self._pool
        pool.take([replace(task, parity=task.measured()) for task in tasks])
        on_progress(*pool.counts(), None)  # not only after the first wait
        while pool.busy:
            if stopping() and pool.drain():
                break
            self._watch()
            for member, task in pool.hand_out():
                self._process(member, task)
            for member, shard in pool.too_slow(self.placement.at_once):
                member.actor.let_go.remote(shard)
            yield from self._collect()
            self._ask_progress()
            on_progress(*pool.counts(), pool.soonest(self.placement.at_once))
            self.description.update(pool.losses())
        if pool.unfinished:
            raise Stopped("stopped as asked")

    def _start(self, member: Member) -> None:
        retries = 0 if member.silent else ATTEMPTS
        call = member.actor.start.options(max_task_retries=retries).remote(self._network)
        self._calls[call] = member, None

    def _process(self, member: Member, task: Task) -> None:
        self._calls[member.actor.process.remote(task, self._network)] = member, task.shard

    def _watch(self) -> None:
        """Tell the user that no worker is live, and why. Raises ResfeatError if that lasts too long
        here, or on a cluster that says that none can come."""
        if self._pool.live:
            self._without_worker = None
            return
        now = time.monotonic()
        if self._without_worker is None:
            self._without_worker, self._tell_after, self._vain_since = now, 0.0, None
        waited = now - self._without_worker
        if not self._address and waited > START_SECONDS:
            raise ResfeatError(
                f"Ray could not start a worker within {START_SECONDS:.0f} s: is it short of "
                "memory? Give fewer --workers, or --workers 0"
            )
        if waited < self._tell_after:
            return
        self._tell_after = waited + min(max(waited, TELL_SOON_SECONDS), TELL_SECONDS)
        so_far = f", {waited:.0f} s so far" if waited else ""
        why = self._why(waited) if self._address and waited else ""
        self._step(f"waiting for the first of {len(self._pool.members)} workers{so_far}{why}")

    def _why(self, waited: float) -> str:
        """What the cluster says of it. Raises ResfeatError if for long that it is vain."""
        from resfeat.engines.growth import wait_of  # which a Ray of our own needs not

        wait = wait_of(self._resources)
        if not wait.is_vain:
            self._vain_since = None
        elif self._vain_since is None:
            self._vain_since = waited
        elif waited - self._vain_since > VAIN_SECONDS:
            raise ResfeatError(
                f"no machine came for a worker within {waited:.0f} s: {wait.told}; give less "
                "--cpus-per-worker or --gpus-per-worker, or have it add larger machines"
            )
        return wait.told and f": {wait.told}"

    def _collect(self) -> Iterator[ShardResult]:
        """Wait for a call to end, but not for long; give the result if it was a shard's."""
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=POLL_SECONDS)
        for call in done:
            member, shard = self._calls.pop(call)
            try:
                answer = ray.get(call)
            except RayTaskError as error:
                failed = _as_resfeat(error)
                if not (member.live and isinstance(failed, DeviceLostError)):
                    raise failed from error
                self._died(member, error, str(failed))  # it ends itself when it is started again
                continue
            except RayError as error:  # of the actor, its node or its memory
                self._died(member, error)
                continue
            if shard is not None and answer is None:
                self._pool.let_go(member, shard)
                continue
            if shard is not None:
                took = self._pool.done(member, shard)
                yield replace(answer, worker=1 + self._pool.members.index(member), took=took)
                continue
            version, process = answer
            if version != __version__:
                raise ResfeatError(
                    f"a worker runs resfeat {version} and this is {__version__}: install one "
                    "version on all machines"
                )
            for task in self._pool.answers(member, process):
                self._process(member, task)

    def _ask_progress(self) -> None:
        """Hear how far the workers are, and which of the idle ones has died."""
        waited_for = set(self._asked.values())
        for member in self._pool.live:
            if member not in waited_for:
                self._asked[member.actor.progress.remote()] = member
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        for call in answered:
            member = self._asked.pop(call)
            try:
                self._pool.heard(member, ray.get(call))
            except RayError as error:
                if not member.in_hand:  # else a shard's call says so too
                    self._died(member, error)

    def _died(self, member: Member, error: RayError, reason: str | None = None) -> None:
        """Take an actor's shards back, and wait for the one that Ray starts in its place; but first
        ask one that may be there. reason: with what can be done about it, where that is known."""
        preempted = getattr(error, "preempted", False)
        unavailable = isinstance(error, ActorUnavailableError)
        if not (member.live or preempted or unavailable):
            raise _cannot_start(error) from error
        self._calls = {call: owner for call, owner in self._calls.items() if owner[0] is not member}
        self._asked = {call: owner for call, owner in self._asked.items() if owner is not member}
        look = f"{MEMORY}, or look at that shard in _resfeat/plan"
        reason = reason or f"{last_line(error)}; {look}"
        if member.live and unavailable and not member.silent:
            member.silent = reason
        else:
            self._pool.died(member, member.silent or reason, preempted=preempted)
        self._start(member)


def _check(stopping: Callable[[], bool]) -> None:
    if stopping():
        raise Stopped("stopped while comparing with fp32")


def _cannot_start(error: RayError) -> ResfeatError:
    why, next_step = last_line(error), MEMORY
    if "No module named" in why:
        next_step = "is resfeat installed on that machine, with all that it needs?"
    return ResfeatError(f"a worker could not start: {why}; {next_step}")


def _as_resfeat(error: RayTaskError) -> Exception:
    """What a worker raised, as it would have been raised here."""
    cause = error.cause if isinstance(error.cause, Exception) else None
    if isinstance(cause, ResfeatError):
        return type(cause)(str(cause))
    return ResfeatError(f"a worker failed: {last_line(cause or error)}")
