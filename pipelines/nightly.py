"""A nightly run for a scheduler: bring a dataset up to date, verify it, print what was found.

    python pipelines/nightly.py SRC OUT [options of `resfeat extract`]

The first night embeds what SRC holds. Every later one embeds what is new or has changed, and
removes the rows of what is gone; a night that was cut off is finished first. What failed and has
not changed stays a failure, unless --retry-failed is among the options. In a crontab:

    0 2 * * *  python pipelines/nightly.py /data/photos /data/embeddings --model resnet50

Exit codes: those of `resfeat extract`, and 1 if a listed image has no row or a part is not what was
committed. Then `resfeat verify --repair` removes the bad shards, and the same command does them
again.
"""

from __future__ import annotations

import json
import subprocess
import sys

import click

from resfeat import open_dataset
from resfeat.dataset.verify import verify
from resfeat.errors import ResfeatError


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("source")
@click.argument("output")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(source: str, output: str, options: tuple[str, ...]) -> None:
    """Bring the embeddings of SOURCE in OUTPUT up to date, and check every row of them."""
    command = [sys.executable, "-m", "resfeat", "extract", source, "-o", output, *options]
    # An update is refused while the first extraction is not done.
    for more in [["--update"]] if is_current(output) else [[], ["--update"]]:
        code = subprocess.run([*command, *more], check=False).returncode
        if code not in (0, 3):  # 3: finished, with many failures; the check is still worth having
            sys.exit(code)

    dataset = open_dataset(output)
    found = verify(dataset)
    reports = sorted(dataset.layout.runs.iterdir())
    report = json.loads(reports[-1].read_bytes())
    missing = report["items"] - found.embedded - found.failed
    print(
        f"checked {report['items']:,} images listed: {found.embedded:,} embedded, "
        f"{found.failed:,} failed, {missing:,} without a row"
    )
    for problem in found.problems:
        print(f"wrong: {problem.path}: {problem.message}")
    print(f"report: {reports[-1]}")
    sys.exit(1 if found.problems else code)


def is_current(output: str) -> bool:
    """Whether there is a dataset, and all of its shards are done, or there is none yet."""
    try:
        dataset = open_dataset(output)
    except ResfeatError:  # which the command tells better
        return True
    return dataset.commits().done.keys() >= dataset.record.plan.shards.keys()


if __name__ == "__main__":
    main()
