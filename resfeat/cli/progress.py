"""Showing where a run stands: a bar on a terminal, plain or JSON lines elsewhere."""

from __future__ import annotations

import json
import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from resfeat.cli import shown

if TYPE_CHECKING:
    from resfeat.reporting import Progress

SECONDS_BETWEEN_LINES = 30.0
# A step that is over sooner is not told.
STEP_SECONDS = 0.5


class Quiet(AbstractContextManager["Quiet"]):
    """Shows nothing."""

    def show(self, progress: Progress) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def step(self, text: str) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Steps(Quiet):
    """Says what is being done, once it has taken a moment."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def step(self, text: str) -> None:
        self._over()
        self._timer = threading.Timer(STEP_SECONDS, self.say, [text])
        self._timer.daemon = True
        self._timer.start()

    def say(self, text: str) -> None:
        """Print what is being done."""
        click.echo(f"{shown(text)} ...", err=True)

    def _over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __exit__(self, *_: object) -> None:
        self._over()


class Bar(_Steps):
    """A tqdm bar: images, images/s, time left, failures, live workers."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    def show(self, progress: Progress) -> None:
        from tqdm import tqdm

        self._over()
        if self._bar is None or self._bar.total != progress.total:
            self._close()
            what = "listing" if progress.total is None else "embedding"
            # `initial` keeps what earlier runs did out of the speed.
            self._bar = tqdm(
                desc=what, total=progress.total, initial=progress.done, unit="img", smoothing=0.1
            )
        self._bar.set_postfix(failed=progress.failed, workers=progress.workers, refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def note(self, text: str) -> None:
        self._close()
        click.echo(f"Note: {shown(text)}", err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._close()


class Lines(_Steps):
    """One line at the start and then every 30 s."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -SECONDS_BETWEEN_LINES
        self._first: tuple[float, int] | None = None

    def show(self, progress: Progress) -> None:
        self._over()
        now = time.monotonic()
        if progress.total is not None and self._first is None:
            self._first = now, progress.done
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self.line(progress, self._speed(progress, now))

    def note(self, text: str) -> None:
        click.echo(f"Note: {shown(text)}", err=True)

    def line(self, progress: Progress, speed: float | None) -> None:
        """Print one line; `speed` is images per second since the first, if there was time."""
        if progress.total is None:
            click.echo(f"listing: {progress.done:,} images so far", err=True)
            return
        text = (
            f"{progress.done:,} of {progress.total:,} images ({progress.done / progress.total:.0%})"
        )
        if speed:
            left = (progress.total - progress.done) / speed
            text += f", {speed:,.1f} images/s, {left / 60:,.0f} min left"
        text += f", {progress.failed:,} failed, {progress.workers} workers"
        click.echo(text, err=True)

    def _speed(self, progress: Progress, now: float) -> float | None:
        if self._first is None or now - self._first[0] < 1:
            return None
        return (progress.done - self._first[1]) / (now - self._first[0])


class JsonLines(Lines):
    """The same as JSON objects on standard output, for programs."""

    def step(self, text: str) -> None:
        click.echo(json.dumps({"event": "step", "text": text}))

    def note(self, text: str) -> None:
        click.echo(json.dumps({"event": "note", "text": text}))

    def line(self, progress: Progress, speed: float | None) -> None:
        rate = round(speed, 2) if speed else None
        click.echo(json.dumps({"event": "progress", **vars(progress), "images_per_second": rate}))
