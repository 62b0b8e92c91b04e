"""Decoding in child processes that may be killed: the careful mode.

Where a file has crashed a worker's decoder, or hung it, the shard is done again with each image in
a child that has a limit of time and one of memory: the image that is to blame becomes a failure
row. A child costs a start of Python, so it is kept until an image kills it.

Run as a module, this is the child: `python -m resfeat.decoding.careful DESCRIPTOR SECONDS`.
"""

import os
import queue
import resource
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from resfeat.decoding.decode import Picture, decode, quiet
from resfeat.errors import Failure, ResfeatError
from resfeat.spec import Decode, Preprocessing

# For one image. The largest that the pixel policy allows take a few seconds, and about 2 GB.
SECONDS = 30.0
MEMORY_BYTES = 4 * 1024**3
# For a child to come up: Python and some libraries, from a disk that may be slow.
START_SECONDS = 45.0
# Children start where this package lies: Python looks for modules in the folder that it is started
# in first, and that may be one of strangers' files.
HOME = Path(__file__).resolve().parents[2]


class CarefulDecoder(AbstractContextManager["CarefulDecoder"]):
    """As many images at a time as there are children; they start when they are needed."""

    def __init__(self, children: int) -> None:
        self._is_closed = False
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(children):
            self._idle.put(None)

    def decode(self, data: bytes, preprocessing: Preprocessing, way: Decode) -> Picture | Failure:
        """As `decode.decode`, and a Failure for what crashes or hangs that. Raises ValueError once
        the decoder is closed, ResfeatError where no child can be started."""
        child = self._idle.get()
        try:
            if self._is_closed:
                raise ValueError("the careful decoder is closed")
            if child and not child.is_alive():  # by its last image, or while it had nothing to do
                child.end()
                child = None
            child = child or _Child()
            return child.decode(data, preprocessing, way)
        finally:
            self._idle.put(child)
            if self._is_closed:
                self._end_idle()

    def __exit__(self, *error: object) -> None:
        self._is_closed = True
        self._end_idle()

    def _end_idle(self) -> None:
        """End the children that wait, and leave their places for whoever still comes."""
        waiting = []
        with suppress(queue.Empty):
            while True:
                waiting.append(self._idle.get_nowait())
        for child in waiting:
            if child:
                child.end()
            self._idle.put(None)


class _Child:
    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(SECONDS)],
                pass_fds=[theirs.fileno()],
                cwd=HOME,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a decoder's last words; the failure row says it
                start_new_session=True,  # what the terminal sends is for the run to heed
            )
        try:
            ready = self._connection.poll(START_SECONDS) and self._connection.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:  # which no image is to blame for
            self.end()
            raise ResfeatError(
                "a decoder process could not be started: is memory short, or limited (ulimit -a)? "
                f"`{sys.executable} -m resfeat.decoding.careful` run in {HOME} may say why"
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def decode(self, data: bytes, preprocessing: Preprocessing, way: Decode) -> Picture | Failure:
        try:
            self._connection.send((data, preprocessing, way))
            outcome: Picture | Failure | ResfeatError = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            if code == -signal.SIGALRM:
                return Failure("decode", "timeout", f"not decoded within {SECONDS:g} s")
            signalled = code < 0 and (signal.strsignal(-code) or f"signal {-code}")
            cause = signalled or f"exit code {code}"
            return Failure("decode", "decoder_crash", f"it ended the decoder's process: {cause}")
        if isinstance(outcome, ResfeatError):
            raise outcome
        return outcome

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _serve(connection: Connection, seconds: float) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = MEMORY_BYTES if allowed == resource.RLIM_INFINITY else min(MEMORY_BYTES, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The alarm ends the process wherever it is, and also where the worker has died meanwhile.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection.send(True)
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the worker is done, or dead
            return
        if task[2] == "turbo":
            import torch  # noqa: F401 (the first time takes seconds, which are no image's)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            outcome: Picture | Failure | ResfeatError = decode(*task)
        except ResfeatError as error:  # no image's fault: the run is to hear of it
            outcome = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(outcome)


if __name__ == "__main__":
    from setproctitle import setproctitle

    setproctitle("resfeat-decoder")  # as much as `top` and the kernel's log have room for
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with quiet():
        _serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
