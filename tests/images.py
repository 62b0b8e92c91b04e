"""A Dockerfile, step by step, without Docker: every RUN and COPY in a root that is thrown away
(pods.py). It is this machine's and not that of `FROM`, so that Python is the tests' and torch is
there: pip really runs, finds what is required installed, and installs resfeat."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pods


def steps(dockerfile: Path) -> list[tuple[str, str]]:
    """Its instructions and what follows them, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line)
    ]


def variables(dockerfile: Path) -> dict[str, str]:
    """The variables that an image sets."""
    (line,) = (rest for word, rest in steps(dockerfile) if word == "ENV")
    return dict(each.split("=", 1) for each in shlex.split(line))


def build(
    dockerfile: Path,
    here: Mapping[str, str],
    arguments: Mapping[str, str],
    look: str,
    also: str = "",
) -> subprocess.CompletedProcess[str]:
    """Do all steps, and then a shell command as the image's user, in its folder.

    here: variables of this machine for each step, such as its PATH. arguments: of --build-arg.
    also: a script that puts into the root, "$root", what this machine cannot download.
    """
    pods.skip_without()
    lines = [pods.START, also, *(f"seen {path}" for path in map(str, pods.SEEN))]
    environment, user, folder = dict(here), "0:0", "/"
    for word, rest in [*steps(dockerfile), ("RUN", look)]:
        if word in ("ENV", "ARG"):
            given = dict(each.split("=", 1) for each in shlex.split(rest))
            environment |= {name: arguments.get(name, each) for name, each in given.items()}
        elif word == "USER":
            user = rest
        elif word == "WORKDIR":
            folder = rest
            lines.append(f'mkdir -p "$root{folder}"')
        elif word == "COPY":
            *sources, target = rest.split()
            place = f'"$root{Path(folder, target)}/"'
            lines.append(f"mkdir -p {place}")
            for source in (pods.ROOT / each for each in sources):
                # Of a folder, COPY takes what is in it.
                lines.append(f"cp -r {source}{'/.' if source.is_dir() else ''} {place}")
        elif word == "RUN":
            named = shlex.join(f"{name}={value}" for name, value in environment.items())
            run = shlex.quote(f"cd {folder} && {rest}")
            lines.append(f'chroot --userspec={user} "$root" env -i {named} /bin/sh -c {run}')
        else:
            assert word in ("FROM", "ENTRYPOINT", "CMD"), f"this does not know {word}"
    with (
        tempfile.TemporaryDirectory() as place,
        pods.unshare("\n".join(lines), place) as process,
    ):
        try:
            told = process.communicate(timeout=1200)
        finally:
            process.kill()  # and with it, all that it started
    return subprocess.CompletedProcess(str(dockerfile), process.returncode, *told)
