"""A real Chromium, driven by its own protocol through a pipe: what a page shows, says and asks for.

A page is opened from its file. All that it logs, every exception, each breach of its policy and
each request is noted.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = f"none of {', '.join(NAMES)} is installed (on Debian: apt-get install chromium)"

SILENT_SECONDS = 60
DESKTOP, PHONE = (1280, 900), (390, 844)
# No sandbox, since root has none; no cards of a GPU; and nothing that Chromium does by itself.
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            "--disable-sync", "--remote-debugging-pipe")  # fmt: skip

# Until every picture is there, and two frames were painted since.
_DRAWN = """
Promise.all([...document.images].map((image) => {
  image.loading = "eager";
  return image.decode().catch(() => 0);
})).then(() => new Promise(
  (done) => requestAnimationFrame(() => requestAnimationFrame(done))))
"""


class Page:
    """One tab. events: all that it told since it was opened."""

    def __init__(self, wire: Wire, session: str) -> None:
        self._wire, self._session = wire, session
        self.events: list[dict[str, Any]] = wire.events

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        return self._wire.ask(method, params, self._session)

    def run(self, script: str) -> Any:
        """The value of an expression, which may be a promise."""
        done = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def open(self, file: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
        """Load a page, and wait until it has drawn itself."""
        self.events.clear()
        width, height = size
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1 if size == DESKTOP else 2, mobile=size == PHONE)  # fmt: skip
        self.ask("Emulation.setTouchEmulationEnabled", enabled=size == PHONE)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=file.absolute().as_uri())
        self._wire.until("Page.loadEventFired")
        self.run(_DRAWN)

    def point(self, x: float, y: float) -> None:
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def complaints(self) -> list[str]:
        """What the console has: errors, warnings and broken policies."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(each) for each in self.events if each["method"] in names]

    def requests(self) -> list[str]:
        """The addresses that were asked for, but for what the page holds itself."""
        asked = (each for each in self.events if each["method"] == "Network.requestWillBeSent")
        urls = [each["params"]["request"]["url"] for each in asked]
        return [url for url in urls if not url.startswith("data:")]

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """What is seen, as a PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))


class Wire:
    """Messages to and from Chromium, each JSON with a zero byte behind it."""

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of = to, of
        self._numbers, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, params: Any, session: str | None = None) -> dict[str, Any]:
        message = {"id": next(self._numbers), "method": method, "params": params}
        if session:
            message["sessionId"] = session
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self._to, left) :]
        while (answer := self._next()).get("id") != message["id"]:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def until(self, event: str) -> None:
        while not any(each["method"] == event for each in self.events):
            self._note(self._next())

    def _note(self, message: dict[str, Any]) -> None:
        if "method" in message:
            self.events.append(message)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._of], [], [], SILENT_SECONDS)
            assert ready, f"Chromium has said nothing for {SILENT_SECONDS} s"
            some = os.read(self._of, 1 << 16)
            assert some, "Chromium ended"
            self._rest += some
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """A browser with one tab; profile: a folder for what it keeps."""
    (theirs, to), (of, back) = os.pipe(), os.pipe()
    words = [PROGRAM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    # It reads from descriptor 3 and writes to 4.
    program = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{back}', "bash", *words],
        pass_fds=(theirs, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    os.close(back)
    try:
        wire = Wire(to, of)
        target = wire.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        about = {"targetId": target, "flatten": True}
        page = Page(wire, wire.ask("Target.attachToTarget", about)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        yield page
    finally:
        program.terminate()
        program.wait()
        os.close(to)
        os.close(of)
