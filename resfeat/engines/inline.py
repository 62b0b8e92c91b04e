"""In the calling process: for debugging, small jobs and tests; the reference for every other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat import runtimes
from resfeat.engines import DRAIN_SECONDS, OnProgress, place
from resfeat.errors import ResfeatError, Stopped
from resfeat.job import SHARDS_IN_HAND, Job, ShardResult
from resfeat.machine import cpu_count
from resfeat.runtimes import keeps_to_the_cpu
from resfeat.spec import RuntimeOptions
from resfeat.worker import Worker, process_shard


class InlineEngine(AbstractContextManager["InlineEngine"]):
    """One worker, in this process."""

    def __init__(
        self, options: RuntimeOptions, job: Job, tensors: Mapping[str, Tensor], quantised: Path
    ) -> None:
        on_cpu = keeps_to_the_cpu(options, job.identity.precision)
        device = "cpu" if on_cpu else _device(options.gpus_per_worker)
        cpus = options.cpus_per_worker or cpu_count()
        self.placement = place(options, job.identity, device, cpus)
        self.description = {"engine": "inline", "workers": 1, **vars(self.placement)}
        network = runtimes.prepare(self.placement.runtime, job.identity, tensors, quantised)
        self.worker = Worker(job, self.placement, network)
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
        self, shards: Sequence[int], on_progress: OnProgress, stopping: Callable[[], bool]
    ) -> Iterator[ShardResult]:
        waiting, left = iter(shards), len(shards)
        in_hand: set[Future[ShardResult]] = set()
        give_up: float | None = None
        on_progress(0, 0, 1)
        while True:
            if stopping() and give_up is None:
                waiting, give_up = iter(()), time.monotonic() + DRAIN_SECONDS
            while len(in_hand) < SHARDS_IN_HAND and (shard := next(waiting, None)) is not None:
                in_hand.add(self._pool.submit(process_shard, self.worker, shard))
            if not in_hand:
                break
            done, in_hand = wait(in_hand, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                left -= 1
            counts = list(self.worker.progress.values())
            on_progress(sum(n for n, _ in counts), sum(failed for _, failed in counts), 1)
            if give_up is not None and time.monotonic() > give_up:
                self.worker.stopping.set()
        if left:
            raise Stopped("stopped as asked")


def _device(gpus: float | None) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if gpus:
        raise ResfeatError(
            "a GPU was asked for and torch sees none here: install a CUDA build of torch and its "
            "driver, or give --gpus-per-worker 0 to run on the CPU"
        )
    return "cpu"
