"""What this machine has."""

import os
import platform
from contextlib import suppress
from typing import Any


def cpu_count() -> int:
    """CPU cores that this process may use, within its container's quota."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max", encoding="utf-8") as file:
        quota, period = map(int, file.read().split())  # "max" is no number: no quota
        allowed = min(allowed, max(1, quota // period))
    return allowed


def memory_bytes() -> int:
    """Memory that this process may use, within its container's limit."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
        there = min(there, int(file.read()))  # "max" is no number: no limit
    return there


def hardware() -> dict[str, Any]:
    """This machine, as a run report names it."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": cpu_count(),
        "memory_bytes": memory_bytes(),
    }


def _cpu_model() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
