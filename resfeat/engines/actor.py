"""What runs in a process of Ray's: a worker behind Ray's calls."""

import os
import platform
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util import get_node_ip_address

from resfeat import __version__
from resfeat.errors import DecoderHungError, DeviceLostError, ResfeatError, Stopped
from resfeat.plan import Shard
from resfeat.runtimes.importing import without_collection
from resfeat.worker import SHARDS_IN_HAND, Job, Placement, ShardResult, Task

with without_collection():
    import torch

    from resfeat.dataset import Layout
    from resfeat.decoding import quiet
    from resfeat.runtimes.cuda import why_no_gpu
    from resfeat.worker.shard import process_shard
    from resfeat.worker.sight import check_sight
    from resfeat.worker.worker import Worker


class RayWorker:
    """The actor: a `Worker` behind Ray's calls."""

    def __init__(self, job: Job, placement: Placement) -> None:
        self._job = job
        self._placement = placement
        self._worker: Worker | None = None
        self._lock = threading.Lock()
        self._process = uuid.uuid4().hex
        self._shards = ThreadPoolExecutor(SHARDS_IN_HAND, "shard")
        self._results: dict[Shard, Future[ShardResult]] = {}
        self._lost = False  # whether the GPU has failed under this process
        self._quiet = quiet()  # for as long as this process lives
        self._quiet.__enter__()

    @ray.method(concurrency_group="control")
    def start(self, network: list[ray.ObjectRef[Any]]) -> tuple[str, str]:
        """Build the model; gives the version of resfeat here, and which process this is."""
        self._ready_worker(network)
        return __version__, self._process

    @ray.method(concurrency_group="shards")
    def process(self, task: Task, network: list[ray.ObjectRef[Any]]) -> ShardResult | None:
        """Do a shard, once however often it is asked for: an answer may be lost on the way. None,
        with nothing of it committed, where it was let go of."""
        worker = self._ready_worker(network)
        with self._lock:
            if task.shard not in self._results:
                self._results[task.shard] = self._shards.submit(process_shard, worker, task)
            doing = self._results[task.shard]
        try:
            return doing.result()
        except Stopped:
            worker.dropped.discard(task.shard)
            with self._lock:  # it may have been begun again by now
                if self._results.get(task.shard) is doing:
                    del self._results[task.shard]
            return None
        except DecoderHungError:
            os._exit(1)  # a thread that hangs can be ended in no other way
        except DeviceLostError:
            self._lost = True
            raise

    @ray.method(concurrency_group="control")
    def embed(
        self, pictures: list[NDArray[np.uint8]], network: list[ray.ObjectRef[Any]]
    ) -> NDArray[np.float32]:
        return self._ready_worker(network).embed(pictures)

    @ray.method(concurrency_group="control")
    def let_go(self, shard: Shard) -> None:
        """Leave a shard that is in hand, unless it is about to be committed, or an image may have
        hung its decoder: who takes that over hangs, too, and this process is the one to end."""
        if self._worker and not self._worker.may_hang():
            self._worker.dropped.add(shard)

    @ray.method(concurrency_group="control")
    def progress(self) -> dict[Shard, tuple[int, int]]:
        return dict(self._worker.progress) if self._worker else {}

    def _ready_worker(self, network: list[ray.ObjectRef[Any]]) -> Worker:
        """The worker, built on first use: Ray restarts an actor without telling us."""
        if self._lost:
            os._exit(1)  # and Ray calls again in the process that it starts in place of this one
        with self._lock:
            if self._worker is None:
                if self._placement.device == "cuda" and not torch.cuda.is_available():
                    raise ResfeatError(
                        f"Ray gave a worker a GPU of {platform.node()}, and {why_no_gpu()} there, "
                        "and give the same command again, it resumes; or give --gpus-per-worker 0"
                    )
                job, machine = self._job, f"{platform.node()} ({get_node_ip_address()})"
                layout = Layout(job.output, job.share)
                check_sight(layout, job.created, job.in_sight, machine)
                torch.set_num_threads(self._placement.cpus)  # Ray says so too late: torch is there
                self._worker = Worker(self._job, self._placement, ray.get(network[0]))
            return self._worker
