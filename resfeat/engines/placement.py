"""How many workers a Ray has room for, and what each asks of it."""

import math

import ray

from resfeat.errors import ResfeatError
from resfeat.runtimes import keeps_to_the_cpu
from resfeat.spec import Identity, RuntimeOptions
from resfeat.worker import Placement

# One CPU worker gets no more cores than this by default; larger machines get more workers.
CPUS_PER_WORKER = 8


def place(
    options: RuntimeOptions, identity: Identity, shards: int
) -> tuple[int, dict[str, float], Placement]:
    """How many workers, what each asks of Ray, and what it uses there."""
    total = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 0.0)
    node_cpus = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    if not cpus:
        raise ResfeatError("this Ray has no CPU yet: wait until its first machine has joined")
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
    placement = Placement.of(options, identity, device, max(1, int(per_worker)))
    # More workers than cores share them; Ray takes fractions.
    asked = {"num_cpus": math.floor(min(per_worker, placement.cpus) * 100) / 100}
    return workers, asked | {"num_gpus": float(share)}, placement
