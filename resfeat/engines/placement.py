"""How many workers a Ray has room for, and what each asks of it."""

import math
from collections.abc import Mapping, Sequence

import ray

from resfeat.errors import ResfeatError
from resfeat.runtimes import keeps_to_the_cpu
from resfeat.spec import Identity, RuntimeOptions, share_of_a_gpu, workers_on_a_gpu
from resfeat.worker import CORES_FED, Placement

# One CPU worker gets no more cores than this by default; larger machines get more workers.
CPUS_PER_WORKER = 8
# By default. Each has the network in the GPU's memory, and a context there.
MOST_SHARE_A_GPU = 8

OR = "; where it adds machines as they are asked for, give --workers and --cpus-per-worker"

Machine = Mapping[str, float]  # its resources, as Ray names them


def place(
    options: RuntimeOptions, identity: Identity, shards: int
) -> tuple[int, dict[str, float], Placement]:
    """How many workers, what each asks of Ray, and what it uses there.

    Workers for GPUs go by the machines that have some. By default several share each, since one
    process does not decode fast enough for it.
    """
    machines: Sequence[Machine] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    share = options.gpus_per_worker
    with_gpu = [machine for machine in machines if machine.get("GPU", 0.0) >= 1]
    if keeps_to_the_cpu(options, identity.precision):
        with_gpu = []
    has_none = not with_gpu if share else not _sum(machines, "CPU")
    if has_none and options.address and options.workers and options.cpus_per_worker:
        return _for_machines_to_come(options, identity, shards)
    if has_none and not share:
        raise ResfeatError(f"this Ray has no CPU yet: wait until its first machine has joined{OR}")
    if has_none:
        raise ResfeatError(
            f"a GPU was asked for (--gpus-per-worker {share:g}) and Ray sees none: check the "
            "driver and CUDA_VISIBLE_DEVICES, or give --gpus-per-worker 0 to run on CPUs"
            + (OR if options.address else "")
        )
    machines = with_gpu or machines
    cpus, gpus = _sum(machines, "CPU"), int(_sum(with_gpu, "GPU"))
    most = max(machine.get("CPU", 0.0) for machine in machines)
    cores = options.cpus_per_worker
    if cores and cores > most:
        is_told = options.workers and (share is not None or not with_gpu)
        if options.address and is_told:
            from resfeat.engines.growth import grows  # which a Ray of our own needs not

            if grows():
                return _for_machines_to_come(options, identity, shards)
        raise ResfeatError(
            f"--cpus-per-worker {cores} is more than any machine has ({most:g}): give less"
        )
    workers = options.workers
    if workers is None:
        workers = by_default(machines, gpus, share, cores)
    workers = min(max(1, workers), shards)
    if gpus:
        share = float(share or share_of_a_gpu(min(math.ceil(workers / gpus), MOST_SHARE_A_GPU)))
        per_worker = cores or min(_cores_each(machine, workers, share) for machine in machines)
    else:
        share = 0.0
        per_worker = cores or min(cpus / workers, most, CPUS_PER_WORKER)
        if options.address:  # those that find no core wait for a machine, and do not share one
            per_worker = max(per_worker, min(1.0, most))
    if not options.address and workers * (cores or 0) > cpus:
        raise ResfeatError(
            f"{workers} workers of {cores} CPU cores are more than the {cpus:g} here: give fewer"
        )
    if not options.address and workers * share > gpus:
        raise ResfeatError(
            f"{workers} workers of {share:g} GPU are more than the {gpus:g} here: give fewer, or a "
            "smaller --gpus-per-worker"
        )
    placement = Placement.of(options, identity, share, max(1, int(per_worker)))
    # More workers than cores share them; Ray takes fractions.
    asked = {"num_cpus": math.floor(min(per_worker, placement.cpus) * 100) / 100}
    return workers, asked | {"num_gpus": share}, placement


def _for_machines_to_come(
    options: RuntimeOptions, identity: Identity, shards: int
) -> tuple[int, dict[str, float], Placement]:
    """What is asked of a Ray without a machine for it, whose autoscaler goes by that. Only what the
    user says can be known of machines that are not there."""
    share, cores = float(options.gpus_per_worker or 0), options.cpus_per_worker or 1
    placement = Placement.of(options, identity, share, cores)
    asked = {"num_cpus": float(cores), "num_gpus": share}
    return min(options.workers or 1, shards), asked, placement


def by_default(
    machines: Sequence[Machine], gpus: int, share: float | None = None, cores: int | None = None
) -> int:
    """How many workers these machines get where nobody says."""
    if gpus:
        return gpus * (workers_on_a_gpu(share) if share else _to_a_gpu(machines, cores))
    most = max(machine.get("CPU", 0.0) for machine in machines)
    return max(1, int(_sum(machines, "CPU") // (cores or min(most, CPUS_PER_WORKER))))


def _sum(machines: Sequence[Machine], resource: str) -> float:
    return sum(machine.get(resource, 0.0) for machine in machines)


def _to_a_gpu(machines: Sequence[Machine], cores: int | None) -> int:
    """Workers to a GPU, so many that each has about the cores that it can use. All ask for the
    same, so the machine that has the fewest cores to a GPU decides."""
    fewest = min(machine.get("CPU", 0.0) / machine["GPU"] for machine in machines)
    return min(max(1, int(fewest // (cores or CORES_FED))), MOST_SHARE_A_GPU)


def _cores_each(machine: Machine, workers: int, share: float) -> float:
    """Cores for each worker on this machine, if as many come to it as its GPUs have room for."""
    room = int(machine["GPU"]) * workers_on_a_gpu(share)
    return machine.get("CPU", 0.0) / min(workers, room)
