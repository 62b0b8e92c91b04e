"""Network namespaces as machines: each has an address, and a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO


class Machines:
    """A switch, and the machines that are plugged into it. They share this machine's files."""

    def __init__(self) -> None:
        self._prefix = f"resfeat-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._names: list[str] = []
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "dev", "bridge", "up")

    def add(self, name: str) -> str:
        """Plug in one more machine. Gives its address."""
        space = self._space(name)
        address = f"10.77.0.{len(self._names) + 1}"
        self._names.append(name)
        _ip("netns", "add", space)
        _ip("link", "add", "cable", "netns", space, "type", "veth",
            "peer", "name", name, "netns", self._switch)  # fmt: skip
        _ip("-n", self._switch, "link", "set", "dev", name, "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
        _ip("-n", space, "link", "set", "dev", "lo", "up")
        _ip("-n", space, "link", "set", "dev", "cable", "up")
        return address

    def cut(self, name: str) -> None:
        """Pull the cable: nobody hears of it, packets just do not arrive."""
        _ip("-n", self._switch, "link", "set", "dev", name, "down")

    def mend(self, name: str) -> None:
        _ip("-n", self._switch, "link", "set", "dev", name, "up")

    def start(
        self, name: str, words: Sequence[object], env: Mapping[str, str], out: int | IO[str]
    ) -> subprocess.Popen[str]:
        """A command on a machine, in a session of its own."""
        return subprocess.Popen(
            [*self.within(name), *map(str, words)],
            env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def within(self, name: str) -> list[str]:
        """What a command begins with to run on a machine."""
        return ["ip", "netns", "exec", self._space(name)]

    def pids(self, name: str) -> list[int]:
        """Of all that runs there."""
        return list(map(int, _ip("netns", "pids", self._space(name)).split()))

    def close(self) -> None:
        """Unplug all. What still runs there keeps running, without a network."""
        for name in (*map(self._space, self._names), self._switch):
            _ip("netns", "del", name)

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"


@contextmanager
def machines() -> Iterator[Machines]:
    made = Machines()
    try:
        yield made
    finally:
        made.close()


def why_none() -> str | None:
    """Why no machines can be made here; None where they can."""
    if not shutil.which("ip"):
        return "no `ip`: on Debian, apt-get install iproute2"
    try:
        with machines() as made:
            made.add("a")
    except subprocess.CalledProcessError as error:
        return f"needs the right to make network namespaces: {error.stderr.strip()}"
    return None


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
