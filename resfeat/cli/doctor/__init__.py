"""resfeat doctor"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from resfeat.cli import leave, options, shown

if TYPE_CHECKING:
    from resfeat.cli.doctor.probing import Finding

WIDEST = 44  # column; what is longer pushes its row's last one to the right
EXAMPLES = """\b
Examples:
  resfeat doctor
  resfeat doctor photos -o embeddings
  resfeat doctor s3://bucket/photos --json | jq '.findings[] | select(.state == "broken")'

\b
Exit codes: 0 extract would work here; 1 something that it needs is broken; 2 wrong usage.
"""


@click.command(epilog=EXAMPLES)
@click.argument("places", metavar="[OUT|SRC]...", nargs=-1)
@click.option("-o", "--output", metavar="OUT", help="A folder or prefix to be written.")
@click.option("--address", help="A Ray cluster that must answer, as for extract.")
@click.option("--fetch", is_flag=True, help="Download the default weights, if they are not there.")
@options.as_json
def doctor(
    places: tuple[str, ...], output: str | None, address: str | None, fetch: bool, as_json: bool
) -> None:
    """Look whether extract would work here: what is installed, what the machine has, whether OUT
    and SRC can be reached; and say what is missing, and how to get it.

    Nothing is written, and nothing is downloaded without --fetch. What does not answer within
    seconds is a finding.
    """
    from resfeat.cli.doctor.examine import examine

    found = examine(places, output, address, fetch)
    broken = [each.what for each in found if each.state == "broken"]
    if as_json:
        click.echo(json.dumps({"works": not broken, "findings": [vars(each) for each in found]}))
    else:
        _print(found)
        told = "extract works here" if not broken else f"broken: {', '.join(broken)}"
        click.echo(f"\n{shown(told)}")
    leave(click.get_current_context(), 1 if broken else 0)


def _print(found: list[Finding]) -> None:
    rows = [("what", "found", "verdict, or what to do")]
    for each in found:
        verdict = {"ok": each.verdict or "ok", "note": each.verdict}.get(
            each.state, f"BROKEN: {each.verdict}"
        )
        rows.append((shown(each.what), shown(each.found), shown(verdict)))
    first, second = (min(WIDEST, max(len(row[n]) for row in rows)) for n in (0, 1))
    for what, there, verdict in rows:
        click.echo(f"{what:<{first}}  {there:<{second}}  {verdict}")
