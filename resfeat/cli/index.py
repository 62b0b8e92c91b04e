"""resfeat index"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from resfeat.cli import options, shown
from resfeat.cli.progress import Lines

if TYPE_CHECKING:
    from resfeat.downstream import Metric
    from resfeat.downstream.index import About, Auto, Kind

EXAMPLES = """\b
Examples:
  resfeat index embeddings
      Choose a kind by size and memory, and say why; later, do what has changed.
  resfeat index embeddings --kind hnsw
  resfeat index embeddings --memory 8 --json
"""


@click.command(epilog=EXAMPLES)
@options.dataset
@options.option(
    "--kind",
    type=click.Choice(["auto", "flat", "ivf", "sq8", "pq", "hnsw"]),
    help="flat: exact; ivf: lists of whole vectors; sq8: a byte a value; pq: a byte for eight; "
    "hnsw: a graph; auto: what suits size and memory.  [default: what was given before, or auto]",
)
@options.option(
    "--metric",
    type=click.Choice(["cosine", "l2"]),
    help="What is near.  [default: what was given before, or cosine]",
)
@options.layer
@options.option(
    "--memory",
    metavar="GB",
    type=click.FloatRange(min=0, min_open=True),
    help="Memory that it may take while it is made, beside Python's own.  [default: half of the "
    "machine's]",
)
@options.as_json
def index(
    output: str, kind: Kind | Auto | None, metric: Metric | None, layer: str | None,
    memory: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Make an index of the dataset OUT, for `resfeat search` and for FAISS itself.

    It lies in OUT/_resfeat/index/<layer>: index.faiss, which FAISS opens, and ids.parquet, which
    has the id of each number that FAISS finds. Its recall is measured against exact search. After
    an update of the dataset, give the same command again.
    """
    from resfeat.dataset import open_dataset
    from resfeat.downstream.index import Wanted, build_index

    dataset = open_dataset(output)
    limit = int(memory * 1e9) if memory else None
    wanted = Wanted(layer=layer, kind=kind, metric=metric, memory=limit)
    with Lines() as lines:
        outcome = build_index(dataset, wanted, lines.step)
    about = outcome.about
    if as_json:
        click.echo(json.dumps({"done": outcome.done, **about.as_json()}))
        return
    click.echo(outcome.done)
    click.echo(f"{about.kind}, {about.metric}: {about.why}")
    click.echo(f"{about.rows:,} x {about.dim:,} in {shown(str(dataset.layout.index(about.layer)))}")
    click.echo(_measured(about))


def _measured(about: About) -> str:
    measured = about.measured
    if measured.recall_at_10 is None:
        return "Too few rows to hold any out and measure it"
    text = (
        f"recall@10 {measured.recall_at_10:.3f} on {measured.queries:,} rows that were held out; "
        f"{measured.seconds * 1e3:,.3g} ms a query, and {measured.exact_seconds * 1e3:,.3g} by "
        "exact search"
    )
    if about.changed:
        text += f" (measured when it was made; {about.changed:,} rows came or went since)"
    return text
