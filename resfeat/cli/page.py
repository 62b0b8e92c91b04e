"""resfeat page"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from resfeat.cli import options
from resfeat.errors import UsageError

if TYPE_CHECKING:
    from resfeat.downstream.page import Kind

EXAMPLES = """\b
Examples:
  resfeat page embeddings
  resfeat page embeddings -o photos.html --map umap
  resfeat page s3://bucket/embeddings -o photos.html
"""


@click.command(epilog=EXAMPLES)
@options.dataset
@click.option(
    "-o", "file", metavar="F.html", type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the page.  [default: OUT/page.html]",
)  # fmt: skip
@click.option(
    "--map", "kind", type=click.Choice(["pca", "umap"]), default="pca", show_default=True,
    help="How to lay out the map; umap needs pip install 'resfeat[umap]'.",
)  # fmt: skip
@options.layer
def page(output: str, file: Path | None, kind: Kind, layer: str | None) -> None:
    """Make a page about the dataset OUT: one HTML file, to be sent to somebody.

    It tells what the dataset is, what failed and why, and how fast the runs were, and shows a map
    of the images, neighbours of some, and groups that are nearly the same. It holds small pictures
    of the images, and loads nothing.
    """
    from resfeat.dataset import open_dataset
    from resfeat.downstream import check_place, write_document
    from resfeat.downstream.page import page as made

    dataset, drafts = open_dataset(output), None
    if file is None:
        if not isinstance(dataset.layout.page, Path):
            raise UsageError(f"{output} is in a store: say with -o where to write the page")
        # What a killed process leaves among the drafts of OUT, the next run removes.
        file, drafts = dataset.layout.page, Path(str(dataset.layout.tmp))
    check_place(str(file))
    text = made(dataset, kind, layer, lambda doing: click.echo(f"{doing} ...", err=True))
    write_document(str(file), text.encode(errors="replace"), drafts)
    click.echo(f"Page: {file} ({len(text) / 1e6:.1f} MB)")
