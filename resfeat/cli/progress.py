"""Showing where a run stands: a bar on a terminal, plain or JSON lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from resfeat.cli import shown

if TYPE_CHECKING:
    from resfeat.reporting import Progress

SECONDS_BETWEEN_LINES = 30.0
# A step that is over sooner is not told.
STEP_SECONDS = 0.5


class Lines(AbstractContextManager["Lines"]):
    """A line at the start and then every 30 s; what is being done, once it has taken a moment."""

    def __init__(self) -> None:
        self._step: threading.Timer | None = None
        self._doing = ""
        self._last = -math.inf
        self._first = 0.0, 0

    def say(self, text: str) -> None:
        """Print a line."""
        click.echo(text, err=True)

    def step(self, text: str) -> None:
        self._over()
        self._step = threading.Timer(STEP_SECONDS, self.say, [f"{shown(text)} ..."])
        self._step.daemon = True
        self._step.start()

    def note(self, text: str) -> None:
        self.say(f"Note: {shown(text)}")

    def show(self, progress: Progress) -> None:
        self._goes_on(progress)
        now = time.monotonic()
        if progress.doing != self._doing:
            self._doing, self._last, self._first = progress.doing, -math.inf, (now, progress.done)
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            since, before = self._first
            self.line(progress, (progress.done - before) / (now - since) if now > since + 1 else 0)

    def line(self, progress: Progress, speed: float) -> None:
        """Print one line. speed: images per second since the first; 0 if it is too early to say."""
        done, total = progress.done, progress.total
        if total is None or progress.doing != "embedding":
            self.say(f"{progress.doing}: {done:,} images{f' of {total:,}' if total else ' so far'}")
            return
        text = f"{done:,} of {total:,} images ({done / total:.0%})"
        if speed:
            text += f", {speed:,.1f} images/s, {(total - done) / speed / 60:,.0f} min left"
        self.say(f"{text}, {progress.failed:,} failed, {progress.workers} workers")

    def end(self) -> None:
        """Nothing more is shown: what follows is the outcome."""
        self._over()

    def _goes_on(self, progress: Progress) -> None:
        """What was being done is over, unless all wait for a worker."""
        if progress.workers or progress.doing != "embedding":
            self._over()

    def _over(self) -> None:
        if self._step is not None:
            self._step.cancel()

    def __exit__(self, *_: object) -> None:
        self._over()


class JsonLines(Lines):
    """The same as JSON objects on standard output, for programs. LOGS.md has the fields."""

    def step(self, text: str) -> None:
        tell("step", text=text)

    def note(self, text: str) -> None:
        tell("note", text=text)

    def line(self, progress: Progress, speed: float) -> None:
        rate = round(speed, 2) if speed else None
        tell("progress", **vars(progress), images_per_second=rate)


def tell(event: str, **fields: Any) -> None:
    """Print a line of --log-json."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    click.echo(json.dumps({"event": event, "time": now, **fields}))


class Quiet(Lines):
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass


class Bar(Lines):
    """A tqdm bar: images, images/s, time left, failures, live workers."""

    _bar: Any = None

    def say(self, text: str) -> None:
        if self._bar is None:
            super().say(text)
        else:
            self._bar.write(text, file=sys.stderr)  # above it, and it is drawn again below

    def show(self, progress: Progress) -> None:
        from tqdm import tqdm

        self._goes_on(progress)
        if self._bar is None or self._doing != progress.doing:
            self._close()
            self._doing = progress.doing
            # `initial` keeps what earlier runs did out of the speed.
            self._bar = tqdm(
                desc=progress.doing,
                total=progress.total,
                initial=progress.done,
                unit="img",
                smoothing=0.1,
            )
        if progress.doing == "embedding":
            self._bar.set_postfix(failed=progress.failed, workers=progress.workers, refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def note(self, text: str) -> None:
        self._close()
        super().note(text)

    def end(self) -> None:
        super().end()
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._close()
