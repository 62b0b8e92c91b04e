"""resfeat verify"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from resfeat.cli import shown

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
@click.argument("output", metavar="OUT")
@click.option(
    "--repair", is_flag=True, help="Remove bad shards, for the extract command to do again."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
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

    def note(text: str) -> None:
        click.echo(f"Note: {shown(text)}", err=True)

    sent = send_back(dataset, found, note) if repair and found.bad_shards else []
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
        click.echo(
            f"{found.unseen:,} shards could not be checked: restore their plan from a copy, or "
            "extract again with a new -o"
        )
    if not found.problems:
        click.echo("Nothing is wrong")
    elif all(each.kind == "unfinished" for each in found.problems):
        click.echo("Unfinished, and nothing is damaged: the extract command resumes")
    elif not found.bad_shards:
        click.echo("Wrong, and no shard is to blame: see above")
    elif sent is not None:
        click.echo(f"Sent back: {len(sent):,} shards; the extract command does just these again")
    else:
        click.echo(
            f"Wrong: {len(found.bad_shards):,} shards; give --repair, then the extract command"
        )
