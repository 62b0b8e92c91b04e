"""A night's work for a scheduler: update a dataset, verify it, index it, make its page.

    python pipelines/nightly.py SRC OUT [options of `resfeat extract`]

The first night embeds what SRC holds. Every later one embeds what is new or has changed, and
removes the rows of what is gone; a night that was cut off is finished first. What failed and has
not changed stays a failure, unless --retry-failed is among the options. The index is in
OUT/_resfeat/index, the page is OUT/page.html; both are replaced whole. In a crontab:

    0 2 * * *  python pipelines/nightly.py /data/photos /data/embeddings --model resnet50

Exit codes: 0 done; 3 done, but more images failed than --max-error-rate allows; 1 something is
wrong: then the last lines say what to do; 2 wrong usage; 75 (EX_TEMPFAIL, try later) another run
is at work on OUT, and nothing was changed; 130 or 143 stopped by SIGINT or SIGTERM, and the next
night goes on.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import click
from setproctitle import setproctitle

from resfeat import open_dataset
from resfeat.cli import call, leave
from resfeat.dataset import Layout, holder
from resfeat.errors import ResfeatError, public

FINISHED = (0, 3)  # 3: with many failures, and the rest is still worth having
BUSY = os.EX_TEMPFAIL


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("source")
@click.argument("output")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def main(context: click.Context, source: str, output: str, options: tuple[str, ...]) -> None:
    """Bring the embeddings of SOURCE in OUTPUT up to date: update, verify, index, page."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    setproctitle(f"resfeat-nightly {public(output)}")  # its arguments may hold secrets
    with alone(output) as is_alone:
        leave(context, night(source, output, options) if is_alone else BUSY)


def night(source: str, output: str, options: tuple[str, ...]) -> int:
    """All of it; gives the exit code."""
    extract = ["extract", source, "-o", output, *options]
    # An update is refused while the first extraction is not done.
    for more in [["--update"]] if is_current(output) else [[], ["--update"]]:
        code = call(*extract, *more)
        if code not in FINISHED:
            is_refused = code == ResfeatError.exit_code and writer(output)
            return BUSY if is_refused else code  # another began in the same moment
    if call("verify", output):
        return 1

    dataset, steps = open_dataset(output), [["index", output], ["page", output]]
    why = ""
    if not dataset.layout.is_on_disk:
        why, steps = "OUT is in a store: no index and no page", []
    elif not dataset.commits().embedded:
        why, steps = "no image gave an embedding: no index and no page", []
    elif not find_spec("faiss"):
        why, steps = "faiss is not installed (pip install 'resfeat[faiss]'): no index", steps[1:]
    if why:
        click.echo(f"Passed over: {why}")
    failed = [step for step in steps if call(*step)]
    return 1 if failed else code


def is_current(output: str) -> bool:
    """Whether there is a dataset, and all of its shards are done, or there is none yet."""
    try:
        dataset = open_dataset(output)
    except (ResfeatError, OSError):  # which the command tells better
        return True
    return dataset.commits().done.keys() >= dataset.record.plan.shards.keys()


@contextmanager
def alone(output: str) -> Iterator[bool]:
    """Hold OUT for a night; gives False, and says why, where another run is at work there.

    A night holds the folder by flock, so nothing is left of one that was killed, and in the
    folder nothing of any. Of nights on other machines, and in a store, only a run that writes is
    seen: there the scheduler has to start one at a time.
    """
    with made(output) as folder:
        try:
            if folder is not None:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            by = writer(output)
        except BlockingIOError:
            by = "another night"
        if by:
            click.echo(f"Busy: {by} is at work on {output}: nothing was changed", err=True)
        yield not by


@contextmanager
def made(output: str) -> Iterator[int | None]:
    """The folder OUT, opened, and made if need be; it goes again if nothing comes of it. None for
    one that is in a store, or cannot be made, which the command tells better."""
    folder, new = None, list[Path]()
    with suppress(ResfeatError, OSError):
        root = Layout(output).root
        if isinstance(root, Path):
            new = [each for each in (root, *root.parents) if not each.exists()]
            root.mkdir(parents=True, exist_ok=True)
            folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield folder
    finally:
        with suppress(OSError):  # it is not empty
            for each in new:
                each.rmdir()
        if folder is not None:
            os.close(folder)


def writer(output: str) -> str | None:
    """The run that is writing OUT; None where there is none."""
    try:
        return holder(Layout(output))
    except (ResfeatError, OSError):  # which the command tells better
        return None


if __name__ == "__main__":
    main()
