"""SIGINT and SIGTERM: the first asks the run to stop, a second one ends it at once."""

import os
import signal
from contextlib import AbstractContextManager
from types import FrameType
from typing import Self

STOPPING = b"\nstopping: finishing what is in hand, 20 s at most; once more ends it at once\n"


class StopSignals(AbstractContextManager["StopSignals"]):
    """Remembers a signal instead of dying of it."""

    def __init__(self) -> None:
        self._number = 0

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """They stay ours: one that comes while the process ends must not change how it ends. A
        process that goes on puts back what was there (`cli.call`)."""

    def received(self) -> bool:
        """Whether the run is to stop."""
        return self._number != 0

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it."""
        return 128 + self._number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            os._exit(128 + number)  # nothing half-made is visible, so nothing needs tidying
        self._number = number
        # Not click.echo: the signal may have come in the middle of one.
        os.write(2, STOPPING)
