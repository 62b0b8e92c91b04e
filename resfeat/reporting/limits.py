"""What limits a run, and what would help, from the seconds that its stages were busy."""

from collections.abc import Mapping

from resfeat.worker import SHARDS_IN_HAND

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
    threads = {"read": cpus + reads_ahead, "decode": cpus, "write": SHARDS_IN_HAND}
    return max(threads, key=lambda stage: stages.get(stage, 0.0) / threads[stage])


def helps(stage: str, device: str, precision: str) -> str:
    """What would make this stage faster."""
    others = {
        ("cpu", "fp32"): "more CPU cores, a GPU, or --precision int8 (bf16, if the CPU has it)",
        ("cpu", "bf16"): "more CPU cores, a GPU, or --precision int8",
        ("cpu", "fp16"): "--precision fp32, which CPUs are made for, or a GPU",
        ("cuda", "fp32"): "more GPUs, or --precision bf16 or fp16",
    }
    more = others.get((device, precision), "more GPUs" if device == "cuda" else "more CPU cores")
    return HELPS.get(stage, more)
