"""A Ray of our own: for one run, on this machine, reached by nobody else.

Ray starts what serves a cluster: a dashboard, for which it waits, a monitor of machines and one of
logs, and a process for each core. A run uses none of that but as many processes as it has workers,
and on two cores it takes two seconds of a start. No option says so: functions of Ray's are replaced
while it starts. A Ray that does not have them starts as it would.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ray._private import parameter, ray_constants, services, utils
from ray._raylet import GcsClient
from ray.job_config import JobConfig

from resfeat.runtimes.hardware import cpu_count

# Whatever the caller has set. Whoever reaches a Ray may run code there: with the first, all its
# parts listen on loopback only. Under `uv run` the second keeps Ray from sending the whole current
# folder to its workers.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # By a worker's process before it is a worker's, while the driver still lists images.
    "RAY_preload_python_modules": "resfeat.engines.actor",
}
# What Ray made of them when it was imported.
_CONSTANTS = {"ENABLE_RAY_CLUSTER": False, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": False}
# The object store holds nothing but the weights; what does not fit goes to the disk.
STORE_BYTES = 2 * 1024**3
_PRESTART = "--num_prestart_python_workers="
NODE_SECONDS, LOOK_SECONDS = 30.0, 0.05


def options() -> dict[str, Any]:
    """For `ray.init`."""
    # Ray would put the current folder first on its workers' path, and import a torch.py that lies
    # there, even if it is not on ours.
    is_on_path = not {"", os.getcwd()}.isdisjoint(sys.path)
    return {
        "address": "local",
        "num_cpus": cpu_count(),
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "job_config": JobConfig(_client_job=not is_on_path),
    }


def replacements(workers: int) -> list[tuple[dict[str, Any], Mapping[str, Any]]]:
    """What is to be in Ray's modules while it starts, for so many workers, by module."""
    without = partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)  # type: ignore[arg-type]
    wanted: list[tuple[Any, Mapping[str, Any]]] = [
        (ray_constants, _CONSTANTS),
        (parameter, {"RayParams": without}),
        # Else the driver imports a web server to find out whether the node's agent could have one.
        (utils, {"get_dashboard_dependency_error": lambda: ImportError("not wanted")}),
        (services, {
            "start_api_server": lambda *_, **__: (None, None),  # what it gives where it cannot
            "start_ray_process": partial(_started, services.start_ray_process, workers),
            "get_node": partial(_found, services.get_node),
        }),
    ]  # fmt: skip
    return [
        (vars(module), {name: new for name, new in values.items() if hasattr(module, name)})
        for module, values in wanted
    ]


def _started(
    start: Callable[..., Any], workers: int, command: Sequence[str], *rest: Any, **options: Any
) -> Any:
    """A process of Ray's, one that starts workers with so many."""
    words = [f"{_PRESTART}{workers}" if word.startswith(_PRESTART) else word for word in command]
    return start(words, *rest, **options)


def _found(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    """A node that has just been started, which Ray itself looks for once a second."""
    end = time.monotonic() + NODE_SECONDS
    with suppress(Exception):  # whatever goes wrong here, Ray's own way says it
        client = GcsClient(address=gcs_address)
        while time.monotonic() < end:
            if any(each.hex() == node_id for each in client.get_all_node_info()):
                break
            time.sleep(LOOK_SECONDS)
    return get_node(gcs_address, node_id)
