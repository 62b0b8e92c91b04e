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
      Read all of it; exit code 1 where anything is wrong.
  resfeat verify embeddings --repair
      Then send the damaged shards back; the extract command does just them again.
"""

SHOWN = 3


@click.command(epilog=EXAMPLES)
@click.argument("output", metavar="OUT")
@click.option(
    "--repair", is_flag=True, help="Remove what is left of bad shards, so they are done again."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify(context: click.Context, /, output: str, repair: bool, as_json: bool) -> None:
    """Check that OUT holds every image once, unchanged since it was committed.

    Each shard is held against the plan and the checksums of its commit, and every vector is looked
    at. Images with equal embeddings are counted, which is no error.

    Exit code 1 where anything is wrong or not done yet, also right after --repair; 0 otherwise.
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
    """The checks and what they found. sent: shards that were sent back, None if none were to be."""
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
            f"{found.unseen:,} shards were not looked at: bring their plan back from a copy, or "
            "make the dataset anew"
        )
    if not found.problems:
        click.echo("Nothing is wrong")
    elif all(each.kind == "unfinished" for each in found.problems):
        click.echo("Unfinished, and nothing is damaged: the extract command goes on")
    elif not found.bad_shards:
        click.echo("Wrong, and no shard is to blame: see above")
    elif sent is not None:
        click.echo(
            f"Sent back: {len(sent):,} shards; give the extract command again, which does just "
            "what is not done"
        )
    else:
        click.echo(
            f"Wrong: {len(found.bad_shards):,} shards; --repair sends them back to be done again"
        )
