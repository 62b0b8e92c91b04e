"""In the calling process: for debugging, small jobs and tests; the reference for every other."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resfeat.backbones.weights import Weights
from resfeat.decoding import quiet
from resfeat.engines import OnProgress
from resfeat.engines.cluster import POLL_SECONDS
from resfeat.engines.pool import Member, Pool
from resfeat.errors import DecoderHungError, Stopped
from resfeat.plan import Shard
from resfeat.spec import RuntimeOptions
from resfeat.worker import SHARDS_IN_HAND, Job, ShardResult, Task
from resfeat.worker.shard import process_shard
from resfeat.worker.worker import Worker, network_for, place_here


class InlineEngine:
    """One worker, in this process."""

    def __init__(self, options: RuntimeOptions, job: Job, weights: Weights) -> None:
        self.placement = place_here(options, job.identity)
        about = {"engine": "inline", "workers": 1, "reads_ahead": job.reads_ahead}
        self.description: dict[str, Any] = about | vars(self.placement)
        self._job = job
        self._network = network_for(job, self.placement, weights.tensors)
        self._worker = Worker(job, self.placement, self._network)
        self._keeping = Lock()  # the worker: whoever embeds a sample needs it to the end
        self._threads = ThreadPoolExecutor(SHARDS_IN_HAND, "shard")
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet())

    def close(self) -> None:
        """Leave the shards in hand unfinished, and let the threads go."""
        self._worker.stopping.set()
        self._threads.shutdown(cancel_futures=True)
        self._worker.close()
        self._quiet.close()

    def embed(
        self, pictures: Sequence[NDArray[np.uint8]], stopping: Callable[[], bool]
    ) -> NDArray[np.float32]:
        with self._keeping:
            return self._worker.embed(pictures)  # beside the shards, which take longer to stop

    def run(
        self, tasks: Sequence[Task], on_progress: OnProgress, stopping: Callable[[], bool]
    ) -> Iterator[ShardResult]:
        member = Member(self._worker, live=True)
        pool = Pool([member])
        pool.take(tasks)
        calls: dict[Future[ShardResult], Shard] = {}
        on_progress(*pool.counts(), pool.soonest(self.placement.at_once))
        while pool.busy:
            if stopping() and pool.drain():
                self._worker.stopping.set()
            for _, task in pool.hand_out():
                calls[self._threads.submit(process_shard, self._worker, task)] = task.shard
            for call in wait(calls, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                try:
                    result = call.result()
                except DecoderHungError:
                    self._replace_worker(calls)
                    calls.clear()
                    pool.died(member, "an image hung the decoder; _resfeat/plan lists that shard")
                    member.live = True
                    self.description.update(pool.losses())
                    break
                yield replace(result, took=pool.done(member, calls.pop(call)))
            pool.heard(member, dict(self._worker.progress))
            on_progress(*pool.counts(), pool.soonest(self.placement.at_once))
        if pool.unfinished:
            raise Stopped("stopped as asked")

    def _replace_worker(self, calls: Collection[Future[ShardResult]]) -> None:
        """Put another worker in the place of one that hangs: its threads cannot be ended."""
        self._worker.stopping.set()
        wait(calls)  # until they have let their shards go
        with self._keeping:
            self._worker.close()
            self._worker = Worker(self._job, self.placement, self._network)
