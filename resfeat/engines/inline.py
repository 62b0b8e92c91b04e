"""In the calling process: for debugging, small jobs and tests; the reference for every other."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat import runtimes
from resfeat.engines import ATTEMPTS, DRAIN_SECONDS, OnProgress, place
from resfeat.errors import DecoderHungError, ResfeatError, Stopped
from resfeat.plan import Shard
from resfeat.runtimes import keeps_to_the_cpu
from resfeat.runtimes.hardware import cpu_count
from resfeat.spec import RuntimeOptions
from resfeat.storage import Location
from resfeat.worker import SHARDS_IN_HAND, Job, ShardResult, Task
from resfeat.worker.shard import process_shard
from resfeat.worker.worker import Worker


class InlineEngine(AbstractContextManager["InlineEngine"]):
    """One worker, in this process."""

    def __init__(
        self, options: RuntimeOptions, job: Job, tensors: Mapping[str, Tensor], quantised: Location
    ) -> None:
        on_cpu = keeps_to_the_cpu(options, job.identity.precision)
        device = "cpu" if on_cpu else _device(options.gpus_per_worker)
        cpus = options.cpus_per_worker or cpu_count()
        self.placement = place(options, job.identity, device, cpus)
        self.description: dict[str, Any] = {
            "engine": "inline",
            "workers": 1,
            "reads_ahead": job.reads_ahead,
            **vars(self.placement),
        }
        self._job = job
        self._network = runtimes.prepare(self.placement.runtime, job.identity, tensors, quantised)
        self.worker = Worker(job, self.placement, self._network)
        self._pool = ThreadPoolExecutor(SHARDS_IN_HAND, "shard")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.worker.stopping.set()
        self._pool.shutdown(cancel_futures=True)
        self.worker.close()

    def embed(
        self, pictures: Sequence[NDArray[np.uint8]], stopping: Callable[[], bool]
    ) -> NDArray[np.float32]:
        given = self._pool.submit(self.worker.embed, pictures)
        while not wait([given], timeout=0.5).done:
            if stopping():
                raise Stopped("stopped while comparing with fp32")
        return given.result()

    def run(
        self,
        tasks: Sequence[Task],
        on_progress: OnProgress,
        stopping: Callable[[], bool],
    ) -> Iterator[ShardResult]:
        waiting, hung = deque(tasks), Counter[Shard]()
        in_hand: dict[Future[ShardResult], Task] = {}
        left = len(tasks)
        give_up: float | None = None
        on_progress(0, 0, 1)
        while waiting or in_hand:
            if stopping() and give_up is None:
                waiting.clear()
                give_up = time.monotonic() + DRAIN_SECONDS
            while len(in_hand) < SHARDS_IN_HAND and waiting:
                task = waiting.popleft()
                in_hand[self._pool.submit(process_shard, self.worker, task)] = task
            for call in wait(in_hand, timeout=0.5, return_when=FIRST_COMPLETED).done:
                task = in_hand.pop(call)
                try:
                    yield call.result()
                    left -= 1
                except DecoderHungError:
                    hung[task.shard] += 1
                    if hung[task.shard] >= ATTEMPTS:
                        raise ResfeatError(
                            f"shard {task.shard} hung {ATTEMPTS} workers: look at it in the plan"
                        ) from None
                    given_up = [task, *self._replace(in_hand)]
                    given_up = sorted(replace(each, careful=True) for each in given_up)
                    if give_up is None:
                        waiting.extendleft(reversed(given_up))
                    break
            counts = list(self.worker.progress.values())
            on_progress(sum(n for n, _ in counts), sum(failed for _, failed in counts), 1)
            if give_up is not None and time.monotonic() > give_up:
                self.worker.stopping.set()
        if left:
            raise Stopped("stopped as asked")

    def _replace(self, in_hand: dict[Future[ShardResult], Task]) -> list[Task]:
        """Put another worker in the place of one that hangs, whose threads cannot be ended. Gives
        the tasks that it had in hand besides, once they are let go."""
        self.worker.stopping.set()
        self.worker.close()
        wait(in_hand)
        tasks = list(in_hand.values())
        in_hand.clear()
        self.worker = Worker(self._job, self.placement, self._network)
        self.description["worker_deaths"] = self.description.get("worker_deaths", 0) + 1
        return tasks


def _device(gpus: float | None) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if gpus:
        raise ResfeatError(
            "a GPU was asked for and torch sees none here: install a CUDA build of torch and its "
            "driver, or give --gpus-per-worker 0 to run on the CPU"
        )
    return "cpu"
