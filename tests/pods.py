"""A container of a pod as a real process, without a container engine: in a root file system of its
own, read-only where the pod asks for that, with its user, its rights, its volumes and nothing but
its environment, as process 1.

The root is this machine's with a layer above it that is thrown away (overlayfs): Debian, Python and
packages are those that the tests have. There is no seccomp profile, no limit of CPU or memory, and
the network is the test's or one of machines.py.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SEEN = {
    ROOT,
    Path(sys.prefix),
    Path(sys.base_prefix),
    Path(os.path.realpath(sys.executable)).parents[1],
}
NO_RIGHTS = "--no-new-privs --inh-caps=-all --bounding-set=-all"

# Its `$1` is a folder for all of it, and `$root` what the process will see as /.
START = """
set -euo pipefail
mount -t tmpfs tmpfs "$1"
mkdir "$1/above" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/above,workdir=$1/work" "$1/root"
root=$1/root
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
seen() {  # keep a path of this machine in sight of other users
    local up=$1
    while [ "$up" != / ]; do chmod o+x "$root$up" 2>/dev/null || true; up=$(dirname "$up"); done
}
"""


@functools.cache
def _refusal() -> str:
    """Why there are none here; empty where there are."""
    if os.geteuid():
        return "only root makes a root file system for a container"
    if missing := [name for name in ("unshare", "setpriv", "chroot") if not shutil.which(name)]:
        return f"a container's root file system needs {missing[0]}"
    with tempfile.TemporaryDirectory() as folder:
        done = unshare(f"{START}\n", folder).communicate()[1]
    return f"no root file system for a container: {done.strip().splitlines()[-1]}" if done else ""


def skip_without() -> None:
    """Skip a test where there are none."""
    if why := _refusal():
        pytest.skip(why)


def unshare(
    script: str, *arguments: object, within: Sequence[str] = (), **options: Any
) -> subprocess.Popen[str]:
    """Begin a script with file systems and processes of its own; they end with it. within: what its
    command begins with, which has to end as that command."""
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    words = [*within, *command, "bash", "-c", script, "bash", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, **options)


class Running:
    """The first process of a container."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def send_signal(self, number: int) -> None:
        """As the kubelet does: to process 1 alone."""
        os.kill(self._first(), number)

    def sees(self, path: str) -> bool:
        """Whether the container has a file, by its own path."""
        return Path(f"/proc/{self._first()}/root{path}").exists()

    def _first(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return int(children.read_text().split()[0])

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, seconds: float = 600) -> tuple[int, str]:
        """Its exit code, and what it wrote."""
        told = "".join(self._process.communicate(timeout=seconds))
        return self._process.returncode, told


@contextmanager
def container(
    pod: Mapping[str, Any],
    words: list[str],
    environment: Mapping[str, str],
    claims: Mapping[str, Path],
    *,
    image: str = "",
    within: Sequence[str] = (),
) -> Iterator[Running]:
    """Words of a command in the first container of a pod, as long as the block lasts.

    environment: all of it. claims: folders that stand for persistent volumes. image: a shell script
    that puts into the root, "$root", what the image has and this machine has not. within: as
    machines.py has it, for the network of one of its machines.
    """
    skip_without()
    (about, *_), security = pod["containers"], pod["securityContext"]
    lines = [START, image]
    volumes = {each["name"]: each for each in pod["volumes"]}
    for mount in about["volumeMounts"]:
        volume, place = volumes[mount["name"]], f'"$root{mount["mountPath"]}"'
        lines.append(f"mkdir -p {place}")
        if claim := volume.get("persistentVolumeClaim"):
            lines.append(f"mount --bind {shlex.quote(str(claims[claim['claimName']]))} {place}")
        else:
            size = volume["emptyDir"].get("sizeLimit", "50%").removesuffix("i")
            lines.append(f"mount -t tmpfs -o mode=1777,size={size} tmpfs {place}")
    for path in map(str, sorted(SEEN)):  # some may be below /tmp, which is a volume now
        lines.append(f'mkdir -p "$root{path}"; mount -o bind,ro {path} "$root{path}"; seen {path}')
    if about["securityContext"]["readOnlyRootFilesystem"]:
        lines.append('mount -o remount,ro "$root"')
    user, group = security["runAsUser"], security["runAsGroup"]
    groups = security.get("fsGroup", group)
    variables = shlex.join(f"{name}={value}" for name, value in environment.items())
    lines.append(
        f'exec chroot "$root" setpriv --reuid {user} --regid {group} --groups {groups} {NO_RIGHTS} '
        f"env -i {variables} {shlex.join(words)}"
    )
    for folder in claims.values():
        _give(folder, groups)
    with tempfile.TemporaryDirectory() as folder:
        process = unshare("\n".join(lines), folder, within=within, start_new_session=True)
        try:
            yield Running(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _give(folder: Path, group: int) -> None:
    """What `fsGroup` has done to a volume: its group may write."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, -1, group)
        path.chmod(path.stat().st_mode | (0o070 if path.is_dir() else 0o060))
