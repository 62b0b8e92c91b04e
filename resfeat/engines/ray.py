"""On Ray: a pool of actors, made once a run. Only this and `cluster.py` know Ray.

Each actor builds its model once, from the network that the driver prepared and put in Ray's object
store. The driver keeps a bounded number of shards in the hands of each live actor; when an actor
dies, Ray starts another in its place and the shards go back to the front of the queue. Actors that
find no room stay pending, which is what makes Ray's autoscaler add nodes.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from torch import Tensor

from resfeat import __version__, runtimes
from resfeat.engines import ATTEMPTS, DRAIN_SECONDS, OnProgress, place
from resfeat.engines.cluster import Cluster, last_line
from resfeat.errors import DecoderHungError, ResfeatError, Stopped
from resfeat.plan import Shard
from resfeat.runtimes import Network, keeps_to_the_cpu
from resfeat.spec import Identity, RuntimeOptions
from resfeat.storage import Location
from resfeat.worker import SHARDS_IN_HAND, Job, Placement, ShardResult, Task
from resfeat.worker.shard import process_shard
from resfeat.worker.worker import Worker

# One CPU worker gets no more cores than this by default; larger machines get more workers.
CPUS_PER_WORKER = 8
POLL_SECONDS = 0.5
# On a cluster a worker may wait for a machine to be added; here there is nothing to wait for.
START_SECONDS = 180.0


class RayWorker:
    """The actor: a `Worker` behind Ray's calls."""

    def __init__(self, job: Job, placement: Placement) -> None:
        self._job = job
        self._placement = placement
        self._worker: Worker | None = None
        self._building = threading.Lock()

    @ray.method(concurrency_group="control", max_task_retries=ATTEMPTS)
    def start(self, network: list[ray.ObjectRef[Any]]) -> str:
        """Build the model; gives the version of resfeat here."""
        self._ready_worker(network)
        return __version__

    @ray.method(concurrency_group="shards")
    def process(self, task: Task, network: list[ray.ObjectRef[Any]]) -> ShardResult:
        try:
            return process_shard(self._ready_worker(network), task)
        except DecoderHungError:
            os._exit(1)  # a thread that hangs can be ended in no other way

    @ray.method(concurrency_group="control", max_task_retries=ATTEMPTS)
    def embed(
        self, pictures: list[NDArray[np.uint8]], network: list[ray.ObjectRef[Any]]
    ) -> NDArray[np.float32]:
        return self._ready_worker(network).embed(pictures)

    @ray.method(concurrency_group="control")
    def progress(self) -> dict[Shard, tuple[int, int]]:
        """Images done and failed so far, by shard in hand."""
        return dict(self._worker.progress) if self._worker else {}

    def _ready_worker(self, network: list[ray.ObjectRef[Any]]) -> Worker:
        """The worker, built on first use: Ray restarts an actor without telling us."""
        with self._building:
            if self._worker is None:
                self._worker = self._build(ray.get(network[0]))
            return self._worker

    def _build(self, network: Network) -> Worker:
        if self._placement.device == "cuda" and not torch.cuda.is_available():
            raise ResfeatError(
                "Ray gave this worker a GPU and torch cannot use it: install a CUDA build of torch "
                f"on {platform.node()}, or give --gpus-per-worker 0"
            )
        return Worker(self._job, self._placement, network)


@dataclass(eq=False)
class _Member:
    """One actor of the pool, as the driver sees it. `in_hand` keeps the order of submission."""

    actor: Any
    live: bool = False
    in_hand: deque[Shard] = field(default_factory=deque)


class RayEngine(AbstractContextManager["RayEngine"]):
    """A pool of Ray actors, on a cluster that is running or on one that is started for the run."""

    def __init__(
        self,
        options: RuntimeOptions,
        job: Job,
        tensors: Mapping[str, Tensor],
        quantised: Location,
        shards: int,
        cluster: Cluster,
    ) -> None:
        self._local = options.address is None
        cluster.ready()
        workers, resources, self.placement = _place(options, job.identity, shards)
        remote = ray.remote(concurrency_groups={"shards": SHARDS_IN_HAND, "control": 1})(
            RayWorker
        ).options(max_restarts=-1, scheduling_strategy="SPREAD", **resources)
        self._members = [_Member(remote.remote(job, self.placement)) for _ in range(workers)]
        try:  # while they start
            self._network = ray.put(
                runtimes.prepare(self.placement.runtime, job.identity, tensors, quantised)
            )
        except BaseException:
            self._dismiss()
            raise
        self.description = {
            "engine": "ray",
            "ray": ray.__version__,
            "address": options.address or "local",
            "workers": workers,
            "reads_ahead": job.reads_ahead,
            **resources,
            **vars(self.placement),
        }

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._dismiss()

    def _dismiss(self) -> None:
        for member in self._members:
            ray.kill(member.actor)

    def embed(
        self, pictures: Sequence[NDArray[np.uint8]], stopping: Callable[[], bool]
    ) -> NDArray[np.float32]:
        call = self._members[0].actor.embed.remote(list(pictures), [self._network])
        deadline = time.monotonic() + START_SECONDS
        while not ray.wait([call], timeout=POLL_SECONDS)[0]:
            if stopping():
                raise Stopped("stopped while comparing with fp32")
            if self._local and time.monotonic() > deadline:
                raise _no_worker()
        try:
            given: NDArray[np.float32] = ray.get(call)
            return given
        except RayTaskError as error:
            raise _as_resfeat(error) from error
        except RayError as error:
            raise ResfeatError(f"a worker could not start: {last_line(error)}") from error

    def run(
        self,
        tasks: Sequence[Task],
        on_progress: OnProgress,
        stopping: Callable[[], bool],
    ) -> Iterator[ShardResult]:
        pool = _Pool(self._members, self._network, tasks)
        give_up: float | None = None
        deadline = time.monotonic() + START_SECONDS
        while pool.busy:
            if stopping():
                pool.waiting.clear()
                give_up = give_up or time.monotonic() + DRAIN_SECONDS
                if time.monotonic() > give_up:
                    break
            if self._local and not pool.live and time.monotonic() > deadline:
                raise _no_worker()
            if pool.live:
                deadline = time.monotonic() + START_SECONDS
            pool.hand_out()
            yield from pool.collect()
            on_progress(*pool.counts())
            self.description["worker_deaths"] = pool.deaths.total()
        if pool.left:
            raise Stopped("stopped as asked")


class _Pool:
    """Which shard is in whose hands."""

    def __init__(
        self,
        members: Sequence[_Member],
        network: ray.ObjectRef[Any],
        tasks: Sequence[Task],
    ) -> None:
        self.waiting = deque(task.shard for task in tasks)
        self._tasks = {task.shard: task for task in tasks}
        self.left = len(tasks)
        self._members = members
        self._network = network
        self.deaths: Counter[Shard] = Counter()
        # Every call under way: whose it is, and the shard, or None for `start`.
        self._calls: dict[ray.ObjectRef[Any], tuple[_Member, Shard | None]] = {}
        self._asked: dict[ray.ObjectRef[Any], _Member] = {}
        self._heard: dict[Shard, tuple[int, int]] = {}
        for member in members:
            self._await_start(member)

    @property
    def live(self) -> bool:
        """Whether any actor has its model."""
        return any(member.live for member in self._members)

    @property
    def busy(self) -> bool:
        """Whether a shard is waiting or in hand."""
        return bool(self.waiting) or any(member.in_hand for member in self._members)

    def hand_out(self) -> None:
        """Give shards to the live actors that have room, the emptiest first."""
        for room in range(SHARDS_IN_HAND):
            for member in self._members:
                if self.waiting and member.live and self._has_room(member, room):
                    shard = self.waiting.popleft()
                    member.in_hand.append(shard)
                    call = member.actor.process.remote(self._tasks[shard], [self._network])
                    self._calls[call] = member, shard

    def _has_room(self, member: _Member, room: int) -> bool:
        """Whether an actor may have the next shard, beside at most `room` others: none where either
        has cost so many workers that the next one decides, so that the right one is blamed."""
        every = [*member.in_hand, self.waiting[0]]
        if any(self.deaths[shard] == ATTEMPTS - 1 for shard in every):
            return not member.in_hand
        return len(member.in_hand) <= room

    def collect(self) -> Iterator[ShardResult]:
        """Wait for a call to end, but not for long; give the result if it was a shard's."""
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=POLL_SECONDS)
        for call in done:
            member, shard = self._calls.pop(call)
            try:
                answer = ray.get(call)
            except RayTaskError as error:
                raise _as_resfeat(error) from error
            except RayError as error:  # of the actor, its node or its memory
                self._died(member, error)
            else:
                if shard is None:
                    self._ready(member, answer)
                else:
                    member.in_hand.remove(shard)
                    self._heard.pop(shard, None)
                    self.left -= 1
                    yield answer

    def counts(self) -> tuple[int, int, int]:
        """Images done and failed in shards in hand, as last heard, and how many actors are live."""
        waited_for = set(self._asked.values())
        live = [member for member in self._members if member.live]
        for member in live:
            if member not in waited_for:
                self._asked[member.actor.progress.remote()] = member
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        for call in answered:
            member = self._asked.pop(call)
            with suppress(RayError):  # it died; the call that did its work says so too
                told = ray.get(call)
                self._heard.update(
                    (shard, told[shard]) for shard in member.in_hand if shard in told
                )
        counts = self._heard.values()
        return sum(n for n, _ in counts), sum(failed for _, failed in counts), len(live)

    def _await_start(self, member: _Member) -> None:
        self._calls[member.actor.start.remote([self._network])] = member, None

    def _ready(self, member: _Member, version: str) -> None:
        if version != __version__:
            raise ResfeatError(
                f"a worker runs resfeat {version} and this is {__version__}: "
                "install one version on all nodes"
            )
        member.live = True

    def _died(self, member: _Member, error: RayError) -> None:
        """Put a dead actor's shards back, to be done in careful mode, and wait for the actor that
        Ray starts in its place."""
        if isinstance(error, ActorUnavailableError) and not member.in_hand:
            time.sleep(POLL_SECONDS)  # it is being started again, and cannot be asked yet
            self._await_start(member)
            return
        if not member.in_hand:
            raise ResfeatError(f"a worker could not start: {last_line(error)}") from error
        # Of its shards the oldest is the likelier reason, and all of them are done again.
        culprit = member.in_hand[0]
        self.deaths[culprit] += 1
        if self.deaths[culprit] >= ATTEMPTS:
            raise ResfeatError(
                f"{ATTEMPTS} workers died while doing shard {culprit}: {last_line(error)}; "
                "give each more memory (fewer --workers), or look at that shard in _resfeat/plan"
            ) from error
        for shard in member.in_hand:
            self._heard.pop(shard, None)
        for shard in member.in_hand:
            self._tasks[shard] = replace(self._tasks[shard], careful=True)
        self.waiting.extendleft(reversed(member.in_hand))
        member.in_hand.clear()
        member.live = False
        self._calls = {call: owner for call, owner in self._calls.items() if owner[0] is not member}
        self._await_start(member)


def _place(
    options: RuntimeOptions, identity: Identity, shards: int
) -> tuple[int, dict[str, float], Placement]:
    """How many workers, what each asks of Ray, and what it makes of that."""
    total = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 0.0)
    node_cpus = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    if not cpus:
        raise ResfeatError(
            "this Ray has no CPU to run on yet: wait until its first worker has joined"
        )
    share = options.gpus_per_worker
    if keeps_to_the_cpu(options, identity.precision):
        share = 0.0
    elif share is None:
        share = 1.0 if gpus else 0.0
    if share and not gpus:
        raise ResfeatError(
            f"a GPU was asked for (--gpus-per-worker {share:g}) and Ray sees none: check the "
            "driver and CUDA_VISIBLE_DEVICES, or give --gpus-per-worker 0 to run on CPUs"
        )
    cores = options.cpus_per_worker
    if cores and cores > node_cpus:
        raise ResfeatError(
            f"--cpus-per-worker {cores} is more than any machine has ({node_cpus:g}): give less"
        )
    workers = options.workers
    most = node_cpus if share else min(node_cpus, CPUS_PER_WORKER)
    if workers is None:
        workers = max(1, int(gpus / share if share else cpus // (cores or most)))
    workers = min(workers, shards)
    if not options.address and workers * (cores or 0) > cpus:
        raise ResfeatError(
            f"{workers} workers of {cores} CPU cores are more than the {cpus:g} here: give fewer"
        )
    if not options.address and workers * share > gpus:
        raise ResfeatError(
            f"{workers} workers of {share:g} GPU are more than the {gpus:g} here: give fewer, or a "
            "smaller --gpus-per-worker"
        )
    per_worker = cores or min(cpus / workers, most)
    device = "cuda" if share else "cpu"
    placement = place(options, identity, device, max(1, int(per_worker)))
    # More workers than cores share them; Ray takes fractions.
    asked = {"num_cpus": float(np.floor(min(per_worker, placement.cpus) * 100) / 100)}
    return workers, asked | {"num_gpus": float(share)}, placement


def _no_worker() -> ResfeatError:
    return ResfeatError(
        f"Ray could not start a worker within {START_SECONDS:.0f} s: is it short of memory? "
        "Give fewer --workers, or --workers 0"
    )


def _as_resfeat(error: RayTaskError) -> Exception:
    """What a worker raised, as it would have been raised here."""
    cause = error.cause if isinstance(error.cause, Exception) else None
    if isinstance(cause, ResfeatError):
        return type(cause)(str(cause))
    return ResfeatError(f"a worker failed: {last_line(cause or error)}")
