"""A nightly run for a scheduler: extract, verify, print what was found, exit with a code.

    python pipelines/nightly.py SRC OUT [options of `resfeat extract`]

Each day gets its own dataset, OUT/<date>, of what SRC holds that day. The same command on the same
day resumes. As a line of a crontab:

    0 2 * * *  python pipelines/nightly.py /data/photos /data/embeddings --model resnet50

Exit codes: those of `resfeat extract`, and 1 if a listed image has no row or a part is not what was
committed. Then `resfeat verify --repair` removes the bad shards, and the same command does them
again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date

import click

from resfeat import open_dataset
from resfeat.dataset.verify import verify


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("source")
@click.argument("output")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(source: str, output: str, options: tuple[str, ...]) -> None:
    """Embed what SOURCE holds today into OUTPUT/<date>, and check every row of it."""
    today = f"{output.rstrip('/')}/{date.today().isoformat()}"

    command = [sys.executable, "-m", "resfeat", "extract", source, "-o", today, *options]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 3):  # 3: finished, with many failures; the check is still worth having
        sys.exit(code)

    dataset = open_dataset(today)
    found = verify(dataset)
    reports = sorted(dataset.layout.runs.iterdir())
    report = json.loads(reports[-1].read_text())
    missing = report["items"] - found.embedded - found.failed
    print(
        f"checked {report['items']:,} images listed: {found.embedded:,} embedded, "
        f"{found.failed:,} failed, {missing:,} without a row"
    )
    for problem in found.problems:
        print(f"wrong: {problem.path}: {problem.message}")
    print(f"report: {reports[-1]}")
    sys.exit(1 if found.problems else code)


if __name__ == "__main__":
    main()
