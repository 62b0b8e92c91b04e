"""resfeat verify"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from resfeat.cli import options, shown
from resfeat.cli.progress import Lines

if TYPE_CHECKING:
    from resfeat.dataset.verify import Verification

EXAMPLES = """\b
Examples:
  resfeat verify embeddings
      Read all of it; exit code 1 if anything is wrong.
  resfeat verify embeddings --repair
      Also remove the damaged shards; the extract command then does just these again.
"""

SHOWN = 3


@click.command(epilog=EXAMPLES)
@options.dataset
@options.option(
    "--repair", is_flag=True, help="Remove bad shards, for the extract command to do again."
)
@options.as_json
@click.pass_context
def verify(context: click.Context, /, output: str, repair: bool, as_json: bool) -> None:
    """Check that OUT holds every image once, unchanged since it was committed.

    Compares each shard with the plan and the checksums of its commit, and looks at every vector.
    Images with equal embeddings are counted, and are no error.

    Exit code 1 if anything is wrong or not done yet, also right after --repair; 0 otherwise.
    """
    from resfeat.dataset import open_dataset
    from resfeat.dataset.verify import repair as send_back
    from resfeat.dataset.verify import verify as look

    dataset = open_dataset(output)
    shards = len(dataset.record.plan.shards)
    with tqdm(total=shards, unit=" shards", leave=False, disable=not sys.stderr.isatty()) as bar:
        found = look(dataset, bar.update)
    sent = send_back(dataset, found, Lines().note) if repair and found.bad_shards else []
    if as_json:
        click.echo(json.dumps({**asdict(found), "bad_shards": found.bad_shards, "sent_back": sent}))
    else:
        _tell(found, sent if repair else None)
    if found.problems:
        context.exit(1)


def _tell(found: Verification, sent: Sequence[int] | None) -> None:
    """Print the checks and what they found. sent: the shards sent back; None without --repair."""
    from resfeat.dataset.verify import CHECKS

    width = max(map(len, CHECKS.values()))
    for kind, check in CHECKS.items():
        problems = [each for each in found.problems if each.kind == kind]
        click.echo(f"{check:<{width}}  {f'{len(problems):,} wrong' if problems else 'yes'}")
        for each in problems[:SHOWN]:
            click.echo(f"    {shown(each.path)}: {shown(each.message)}")
        if len(problems) > SHOWN:
            click.echo(f"    and {len(problems) - SHOWN:,} more; --json names them all")
    click.echo(
        f"{found.embedded:,} embedded and {found.failed:,} failed in {found.shards:,} shards; "
        f"{found.duplicates:,} have the same embedding as another"
    )
    if found.unseen:
        told = "shards could not be checked: restore their plan from a copy, or extract again with"
        click.echo(f"{found.unseen:,} {told} a new -o")
    if not found.problems:
        verdict = "Nothing is wrong"
    elif all(each.kind == "unfinished" for each in found.problems):
        verdict = "Unfinished, and nothing is damaged: the extract command resumes"
    elif not (bad := found.bad_shards):
        verdict = "Wrong, and no shard is to blame: see above"
    elif sent is not None:
        verdict = f"Sent back: {len(sent):,} shards; the extract command does just these again"
    else:
        verdict = f"Wrong: {len(bad):,} shards; give --repair, then the extract command"
    click.echo(verdict)
