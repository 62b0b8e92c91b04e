"""Ray itself: joining a cluster, or starting one for the run while other work is done."""

import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from threading import Event
from typing import Any

from resfeat.errors import ResfeatError, Stopped, UsageError, public

# Unless the caller has set them. Without the first two, which are read when Ray is imported, it
# prints its own words about dead workers to standard output, and its C++ part takes SIGTERM from us
# and aborts. The third keeps older versions from warning about CUDA_VISIBLE_DEVICES.
SWITCHES = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Ray sets these by itself.
RAYS_OWN = ("PYTHONBREAKPOINT", "RAY_AUTH_MODE", "RAY_CLIENT_MODE")

CONNECT_SECONDS = 10.0
LEAVE_SECONDS = 15.0
POLL_SECONDS = 0.5  # of whoever waits, between two looks at whether to stop
UNDER_WAY_SECONDS = 2.0  # how long `begin` waits, at most, for Ray's processes to be started

CLIENT = (
    "Ray Client, which resfeat does not use: on a machine of the cluster give --address HOST:PORT, "
    "or submit the command with `ray job submit`"
)


class Cluster:
    """Ray for the length of a run. It takes seconds to start, so `begin` returns while it does.

    In the main thread Ray would replace our handler of SIGTERM by one that can lose the signal, and
    its processes die with the thread that started them: so that is a thread of its own. Environment
    variables are changed until `close`. step: is told what the run waits for. workers: for
    how many a Ray that is started here has a process ready; None for as many as by default.
    """

    def __init__(
        self, address: str | None, step: Callable[[str], None], workers: int | None = None
    ) -> None:
        if address:
            _named(address)
        self.step = step
        self._address = address
        self._workers = workers
        self._starter = ThreadPoolExecutor(1, "ray-init")
        self._under_way = Event()
        self._connected: Future[bool] | None = None
        self._at_close = ExitStack()
        self._at_close.callback(self._starter.shutdown, wait=False)

    def begin(self) -> Future[bool]:
        """Start to connect, if that has not been done; returns once Ray's last process is
        started, or, of a cluster that is joined, Ray is imported."""
        if self._connected is None:
            self._connected = self._starter.submit(self._connect)
            self._connected.add_done_callback(lambda _: self._under_way.set())
            # Importing torch meanwhile would take the interpreter from Ray, half of the time: its
            # processes would begin a second later, and with them the workers.
            self._under_way.wait(UNDER_WAY_SECONDS)
        return self._connected

    def ready(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Wait until Ray can be used. Raises ResfeatError if it cannot, Stopped on the way."""
        if not self.begin().done():
            self.step(f"joining Ray at {self._address}" if self._address else "starting Ray")
        while not wait([self.begin()], timeout=POLL_SECONDS).done:
            if stopping():
                raise Stopped("stopped while Ray was starting")
        self.begin().result()

    def close(self) -> None:
        """End the Ray that was started here, leave one that was joined."""
        with self._at_close, suppress(ResfeatError):  # told by `ready`, or another came first
            # A start that takes longer ends with this process.
            ended = self._connected and wait([self._connected], timeout=LEAVE_SECONDS).done
            if ended and ended.pop().result():
                import ray

                ray.shutdown()

    def _connect(self) -> bool:
        """Join a cluster, or start one here. False if our caller has already done so."""
        given = {name: os.environ.get(name, value) for name, value in SWITCHES.items()}
        self._change(os.environ, given | {name: os.environ.get(name) for name in RAYS_OWN})
        import ray
        from ray._private import ray_constants

        if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
            raise UsageError(f"this process is connected by {CLIENT}")
        if ray.is_initialized():
            return False
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._change(vars(ray_constants), {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": True})
        where, hint = f"join Ray at {self._address}", "check --address"
        try:
            options: dict[str, Any] = {"address": self._address}
            starting: AbstractContextManager[None] = nullcontext()
            if self._address:
                self._under_way.set()
                if there := address_of(self._address):
                    from resfeat.engines import reach

                    reach.reach(there, CONNECT_SECONDS)
            else:
                where, hint = "start Ray", "try again on a less busy machine, or give --workers 0"
                from resfeat.engines import alone

                self._change(os.environ, alone.environment())
                self._change(vars(ray_constants), alone.CONSTANTS)
                options = alone.options()
                starting = alone.only_what_a_run_needs(self._workers, self._under_way.set)
            with starting:
                ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except ResfeatError as error:
            raise ResfeatError(f"cannot {where}: {error}") from error
        except Exception as error:  # Ray's own time-out is of no narrower class
            raise ResfeatError(f"cannot {where}: {last_line(error)}; {hint}") from error
        return True

    def _change(self, table: MutableMapping[str, Any], values: Mapping[str, Any]) -> None:
        """Set these in `table` until `close`; None leaves one as it is until then."""
        for name, value in values.items():
            if name in table:
                self._at_close.callback(table.__setitem__, name, table[name])
            else:
                self._at_close.callback(table.pop, name, None)
            if value is not None:
                table[name] = value


def address_of(asked: str | None) -> str | None:
    """The cluster that is asked for, or the one that `auto` and nothing stand for: that of
    RAY_ADDRESS, or the last that was started here. None where there is neither. Raises as
    `_named`."""
    if told := _named(asked):
        return told
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if not os.access(file, os.R_OK):
        return None
    _take_own_token()
    return file.read_text().strip()


def _named(asked: str | None) -> str | None:
    """The address that is asked for, or that RAY_ADDRESS has. Raises UsageError for one of Ray
    Client: of a cluster behind that `reach` could ask nothing, and a run would end with its
    connection."""
    for told in (asked, os.environ.get("RAY_ADDRESS")):
        if told and told.startswith("ray://"):
            raise UsageError(f"{public(told)} is an address of {CLIENT}")
        if told not in (None, "", "auto"):
            return told
    return None


def _take_own_token() -> None:
    """Use the token in this user's home, as Ray does for a cluster that it finds by itself, and for
    no other: whoever is told it may run code in this user's clusters."""
    logging.getLogger("ray").setLevel(logging.ERROR)  # it says so at length
    with suppress(ImportError):  # an older Ray, whose clusters want none by default
        from ray._private.authentication import authentication_token_setup as setup

        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: Ray puts the reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
