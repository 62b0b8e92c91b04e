"""A Ray of our own: for one run, on this machine, reached by nobody else.

Ray starts what serves a cluster: a dashboard, for which it waits, a monitor of machines and one of
logs, and a process for each core. A run needs only a process for each of its workers; on two cores
the rest makes a start two seconds longer. Ray has no option to leave it out, so functions of Ray's
are replaced while it starts. A Ray that does not have these functions starts in its own way.
"""

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from ray.job_config import JobConfig

from resfeat.engines.placement import CPUS_PER_WORKER
from resfeat.runtimes.hardware import cpu_count

# Whatever the caller has set. Whoever reaches a Ray may run code there: with the first, all its
# parts listen on loopback only. Under `uv run` the second keeps Ray from sending the whole current
# folder to its workers.
ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
# What Ray made of them when it was imported.
CONSTANTS = {"ENABLE_RAY_CLUSTER": False, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": False}
# A process of Ray's imports this before it is a worker, while the driver still lists images. It
# does not have the driver's own path yet.
PRELOADED = {"RAY_preload_python_modules": "resfeat.engines.preloaded"}
# The object store holds nothing but the weights; what does not fit goes to the disk.
STORE_BYTES = 2 * 1024**3
_PRESTART = "--num_prestart_python_workers="
# How long to look for the node, and how often; then Ray looks once a second.
NODE_SECONDS, LOOK_SECONDS = 5.0, 0.05


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


def environment() -> dict[str, str]:
    """Variables for its processes."""
    # A program may lie beside a resfeat or a torch of its own, which is the one to be imported.
    first = "" if sys.flags.safe_path else os.path.abspath(sys.path[0])
    names = [name + end for name in ("resfeat", "torch") for end in ("", ".py")]
    is_shadowed = first and any(os.path.exists(os.path.join(first, name)) for name in names)
    return ENVIRONMENT if is_shadowed else ENVIRONMENT | PRELOADED


@contextmanager
def only_what_a_run_needs(workers: int | None, under_way: Callable[[], object]) -> Iterator[None]:
    """Around `ray.init`. workers: None for as many as there are by default. under_way: is called
    once Ray's processes are started, or at once for a Ray that has other functions."""
    ready = min(workers or max(1, cpu_count() // CPUS_PER_WORKER), cpu_count())
    with ExitStack() as stack:
        try:
            for module, name, new in _replacements(ready, under_way):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, new)
        except (ImportError, AttributeError):
            under_way()
        yield


def _replacements(ready: int, under_way: Callable[[], object]) -> list[tuple[Any, str, Any]]:
    """Module, name, and what takes its place. Raises ImportError or AttributeError for a Ray that
    does not have them."""
    from ray._private import parameter, services, utils

    less: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    if not less.keys() <= inspect.signature(parameter.RayParams).parameters.keys():
        raise AttributeError("RayParams has no monitors")
    start = partial(_started, services.start_ray_process, ready, under_way)
    return [
        (parameter, "RayParams", partial(parameter.RayParams, **less)),
        # Else the driver imports a web server to find out whether the node's agent could have one.
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")),
        (services, "start_api_server", lambda *_, **__: (None, None)),  # as where it fails
        (services, "start_ray_process", start),
        (services, "get_node", partial(_found, services.get_node)),
    ]


def _started(
    start: Callable[..., Any],
    ready: int,
    under_way: Callable[[], object],
    command: Sequence[str],
    *rest: Any,
    **options: Any,
) -> Any:
    """A process of Ray's; the last one, which starts workers, is to have so many ready."""
    words = [f"{_PRESTART}{ready}" if word.startswith(_PRESTART) else word for word in command]
    process = start(words, *rest, **options)
    if any(word.startswith(_PRESTART) for word in words):
        under_way()
    return process


def _found(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    """A node that has just been started."""
    end = time.monotonic() + NODE_SECONDS
    with suppress(Exception):  # whatever goes wrong here, Ray's own way says it
        from ray._raylet import GcsClient

        client = GcsClient(address=gcs_address)
        while time.monotonic() < end:
            if any(each.hex() == node_id for each in client.get_all_node_info()):
                break
            time.sleep(LOOK_SECONDS)
    return get_node(gcs_address, node_id)
