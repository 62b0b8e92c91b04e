"""Ray itself: joining a cluster, or starting one for a run, beside whatever is done meanwhile."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from resfeat.errors import ResfeatError, Stopped
from resfeat.runtimes.hardware import cpu_count

# Ray reads these on import. It would print its own words about dead workers to standard output, and
# its C++ part would take SIGTERM away from us and abort.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")

# Of the object store, which holds the weights and nothing else; it takes only what it is given, and
# what does not fit goes to the disk.
STORE_BYTES = 2 * 1024**3
CONNECT_SECONDS = 5.0
LEAVE_SECONDS = 15.0
POLL_SECONDS = 0.5


class Cluster(AbstractContextManager["Cluster"]):
    """Ray for the length of a run. It takes seconds to start, so `begin` returns at once.

    In the main thread Ray would put a Python handler of SIGTERM in place of ours, which can lose
    the signal. Its processes die with the thread that started them, so that one is kept.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._starter = ThreadPoolExecutor(1, "ray-init")
        self._connected: Future[bool] | None = None

    def begin(self) -> Future[bool]:
        """Start to connect, if that has not been done."""
        if self._connected is None:
            self._connected = self._starter.submit(_connect, self._address)
        return self._connected

    def ready(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Wait until Ray can be used. Raises ResfeatError where it cannot, Stopped on the way."""
        while not wait([self.begin()], timeout=POLL_SECONDS).done:
            if stopping():
                raise Stopped("stopped while Ray was starting")
        self.begin().result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with suppress(ResfeatError):  # `ready` raised it, or something else has gone first
                # One that does not come to an end is left to the end of this process.
                ended = self._connected and wait([self._connected], timeout=LEAVE_SECONDS).done
                if ended and ended.pop().result():
                    import ray

                    ray.shutdown()
        finally:
            self._starter.shutdown(wait=False)


def _connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start one on this machine; False where the program that
    calls us has already done so."""
    if not address:
        # Whoever reaches a Ray may run code there. This is Ray's switch for listening on loopback
        # only, on any system; it is read on import.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Under `uv run` it would send all that lies in the current folder to its workers.
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray
    from ray.exceptions import RayError
    from ray.job_config import JobConfig

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address:
            _check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with _alone():
                ray.init(
                    address="local",
                    num_cpus=cpu_count(),
                    include_dashboard=False,
                    object_store_memory=STORE_BYTES,
                    # Ray would put the folder that we stand in before all others on its workers'
                    # path, and import a torch.py that lies there, even where ours has none such.
                    job_config=JobConfig(_client_job=not {"", os.getcwd()}.intersection(sys.path)),
                    **quiet,
                )
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        where = f"join Ray at {address}" if address else "start Ray"
        hint = "check --address" if address else "--workers 0 does without it"
        raise ResfeatError(f"cannot {where}: {last_line(error)}; {hint}") from error
    return True


@contextmanager
def _alone() -> Iterator[None]:
    """The switches of `_connect` once more, for who imported Ray before they called us; afterwards
    their own Ray is as it was."""
    from ray._private import ray_constants

    names = ("ENABLE_RAY_CLUSTER", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")
    before = {name: getattr(ray_constants, name, True) for name in names}
    try:
        for name in names:
            setattr(ray_constants, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(ray_constants, name, value)


def _check_reachable(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself goes on trying for many minutes."""
    if address == "auto":
        named = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        address = os.environ.get("RAY_ADDRESS") or (named.read_text() if named.exists() else "")
    host, _, port = address.strip().removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    if host in ("127.0.0.1", "localhost"):
        from ray.util import get_node_ip_address

        # Ray takes that for the machine's own address, and asks there for many minutes.
        own = get_node_ip_address()  # type: ignore[no-untyped-call]
        try:
            socket.create_connection((own, int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(
                f"it listens on loopback, and Ray would look for it at {own}: start it with "
                f"--node-ip-address {own}, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
            ) from error


def last_line(error: BaseException) -> str:
    """The last of what an error says: Ray puts the reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
