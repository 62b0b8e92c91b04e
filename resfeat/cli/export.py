"""resfeat export"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from resfeat.cli import leave, options
from resfeat.cli.signals import StopSignals
from resfeat.errors import Stopped

if TYPE_CHECKING:
    from resfeat.downstream.export import Form

EXAMPLES = """\b
Examples:
  resfeat export embeddings --to npy vectors
      vectors/embeddings.npy, for np.load(..., mmap_mode="r"), and vectors/ids.parquet
  resfeat export embeddings --to clip folder
      As clip-retrieval and autofaiss read it.
  resfeat export embeddings --to faiss index
      (pip install 'resfeat[faiss]')
  resfeat export embeddings --to lance embeddings.lance
      (pip install 'resfeat[lance]')
"""


@click.command(epilog=EXAMPLES)
@options.dataset
@click.argument("dest", metavar="DEST")
@click.option(
    "--to", "form", type=click.Choice(["npy", "clip", "faiss", "lance"]), required=True,
    help="What to write.",
)  # fmt: skip
@options.layer
@click.pass_context
def export(
    context: click.Context, /, output: str, dest: str, form: Form, layer: str | None
) -> None:
    """Write the embeddings of the dataset OUT to DEST, in a form that other tools take.

    DEST must not be there yet. The rows are streamed in plan order; what was half written when it
    went wrong is removed. Of several layers lance has all.
    """
    from resfeat.dataset import open_dataset
    from resfeat.downstream.export import export as write

    dataset = open_dataset(output)
    click.echo(f"writing {dest} ...", err=True)
    with StopSignals() as signals:
        try:
            count = write(dataset, form, dest, layer, signals.received)
        except Stopped as stopped:
            click.echo(str(stopped), err=True)
            leave(context, signals.exit_code)
    click.echo(f"Exported {count:,} rows to {dest}")
