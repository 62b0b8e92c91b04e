"""SIGINT and SIGTERM: the first asks the run to stop, a second one ends it at once."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = b"\nstopping: finishing what is in hand, 20 s at most; once more ends it at once\n"


class StopSignals(AbstractContextManager["StopSignals"]):
    """Remembers a signal instead of dying of it."""

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._number:
            return  # one more while the process ends must not change how it ends
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
