"""What limits a run, and what would help, from the seconds that its stages were busy."""

import math
from collections.abc import Mapping
from typing import Any

from resfeat.worker import CORES_FED, SHARDS_IN_HAND

# The model counts as kept waiting when its share of waiting for pixels is above this.
WAITING = 0.2

HELPS = {
    "read": "faster storage, or workers nearer to the images",
    "decode": "more CPU cores for each worker",
    "write": "a faster disk for the output",
}


def waited(stages: Mapping[str, float]) -> float:
    """Share of its time, 0 to 1, that the model waited for pixels."""
    wait, embed = stages.get("wait", 0.0), stages.get("embed", 0.0)
    return wait / (wait + embed) if wait + embed else 0.0


def bottleneck(stages: Mapping[str, float], cpus: int, reads_ahead: int) -> str | None:
    """The stage that decided the speed: read, decode, embed or write. None if nothing ran.

    stages: busy seconds, added up over threads. cpus: of each worker. reads_ahead: as a job has it.
    """
    if not stages.get("embed"):
        return None
    if waited(stages) <= WAITING:
        return "embed"
    # The one whose threads were the busiest.
    threads = _threads(cpus, reads_ahead)
    return max(threads, key=lambda stage: stages.get(stage, 0.0) / threads[stage])


def enough(stages: Mapping[str, float], engine: Mapping[str, Any], seconds: float) -> int | None:
    """With how many workers the GPUs would have been as busy, if that is fewer than there were.
    None unless several shared a GPU that was the limit.

    Of the workers on one GPU each counts the seconds that its passes took, so also those in which
    it waited for another's: they add up to more than the GPU was busy, and say nothing of how many
    are needed. Those of the other stages do. A stage that was busy for b seconds, of a run of s,
    with t threads in a worker, took all the threads of b / (s t) workers. To keep the GPUs from
    waiting, its threads should be busy for no more than 1 - WAITING of the time:

        k = max over read, decode, write of b / (s t (1 - WAITING)), rounded up

    and at least one for each GPU: one worker's passes follow each other without a gap. What one
    process loses to Python's lock when it does the work of several is not in it.

    engine: its description, as in a report. seconds: from the first worker to the last commit.
    """
    workers, share = engine["workers"], engine["gpus"]
    cpus, reads_ahead = engine["cpus"], engine["reads_ahead"]
    if not 0 < share <= 0.5 or not seconds or bottleneck(stages, cpus, reads_ahead) != "embed":
        return None
    threads = _threads(cpus, reads_ahead)
    busiest = max(stages.get(stage, 0.0) / count for stage, count in threads.items())
    least = math.ceil(workers * share)  # one for each GPU
    needed = max(math.ceil(busiest / (seconds * (1 - WAITING))), least)
    return needed if needed < workers else None


def _threads(cpus: int, reads_ahead: int) -> Mapping[str, int]:
    """How many of a worker's threads each stage has, apart from the model."""
    return {"read": cpus + reads_ahead, "decode": cpus, "write": SHARDS_IN_HAND}


def helps(stage: str, device: str, precision: str, cpus: int) -> str:
    """What would make this stage faster. cpus: of each worker."""
    if (stage, device) == ("decode", "cuda"):
        if cpus > CORES_FED:  # Python's lock, not the cores
            return f"more workers to a GPU, since one decodes on hardly more than {CORES_FED} cores"
        return "more CPU cores for each GPU"
    others = {
        ("cpu", "fp32"): "more CPU cores, a GPU, or --precision int8 (bf16, if the CPU has it)",
        ("cpu", "bf16"): "more CPU cores, a GPU, or --precision int8",
        ("cpu", "fp16"): "--precision fp32, which CPUs are made for, or a GPU",
        ("cuda", "fp32"): "more GPUs, or --precision bf16 or fp16",
    }
    more = others.get((device, precision), "more GPUs" if device == "cuda" else "more CPU cores")
    return HELPS.get(stage, more)
