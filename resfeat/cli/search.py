"""resfeat search"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from resfeat.cli import options, shown
from resfeat.cli.failed import end, tell_failed
from resfeat.errors import UsageError

if TYPE_CHECKING:
    from resfeat.dataset import Dataset
    from resfeat.downstream import Metric, Neighbours, Queries

EXAMPLES = """\b
Examples:
  resfeat search embeddings photos/cat.jpg
  resfeat search embeddings new-photos/ -k 5 --html nearest.html
      Each image of a folder; a page to look at, or to send to someone.
  resfeat search embeddings --id cat/1.jpg --id cat/2.jpg --sheet nearest.png
      Images of the dataset, by their ids; a picture.
  resfeat search embeddings vectors.npy --metric l2
      Vectors of your own, float32 [Q, D].
  resfeat search embeddings cat.jpg --json | jq '.[0].neighbours[0].id'
"""


@click.command(epilog=EXAMPLES)
@options.dataset
@click.argument("queries", metavar="QUERY...", nargs=-1)
@click.option("--id", "ids", metavar="ID", multiple=True, help="An image of OUT; repeat for more.")
@click.option(
    "-k", default=10, show_default=True, type=click.IntRange(min=1), help="How many to find."
)
@click.option(
    "--metric", default="cosine", show_default=True, type=click.Choice(["cosine", "l2"]),
    help="What near means: the angle, or the distance.",
)  # fmt: skip
@options.layer
@click.option("--exact", is_flag=True, help="Look at all rows, also where there is an index.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, an object a query.")
@click.option(
    "--sheet", metavar="F.png", type=click.Path(dir_okay=False),
    help="Draw queries and finds as a picture.",
)  # fmt: skip
@click.option(
    "--html", metavar="F.html", type=click.Path(dir_okay=False),
    help="Write them as one page that needs nothing beside it.",
)  # fmt: skip
@click.pass_context
def search(
    context: click.Context, output: str, queries: tuple[str, ...], ids: tuple[str, ...], k: int,
    metric: Metric, layer: str | None, exact: bool, as_json: bool, sheet: str | None,
    html: str | None,
) -> None:  # fmt: skip
    """Find the images of the dataset OUT that are nearest to each QUERY: an image file, a folder of
    them, or a .npy of vectors.

    Exact, over all rows, but where there is an index of the dataset as it stands (`resfeat
    index`), which may miss a few. An image is embedded as the dataset's own were; those of a folder
    that give no embedding are told and passed over. Exits with 3 if they are more than 5 % of the
    images to embed, as extract does, and with 2 if no query is left.
    """
    if not queries and not ids:
        raise UsageError("nothing to look for: name an image, a folder or a .npy, or give --id ID")
    from resfeat import downstream
    from resfeat.dataset import open_dataset

    dataset = open_dataset(output)
    if sheet:
        downstream.check_picture(sheet)
    if html:
        downstream.check_place(html)
    if not (rows := dataset.rows()):
        raise dataset.empty()
    asked = downstream.queries_of(dataset, queries, ids, layer)
    tell_failed(asked.failed)
    index, why = (None, "") if exact else downstream.usable_index(dataset, layer, metric)
    if why:
        click.echo(f"Note: {shown(why)}; this search is exact", err=True)
    if index:
        found = index.search(asked.vectors, k)
    else:
        found = downstream.nearest(dataset, asked.vectors, k, layer, metric)
    if k > rows:
        click.echo(
            f"Note: {output} has {rows:,} images, fewer than -k {k}: these are all", err=True
        )
    name = "cosine" if metric == "cosine" else "distance"
    answers = [
        (query, list(zip(row.tolist(), scores.tolist(), strict=True)))
        for query, row, scores in zip(asked.names, found.ids, found.scores, strict=True)
    ]
    if as_json:
        told = [
            {"query": query, "neighbours": [{"id": each, name: score} for each, score in row]}
            for query, row in answers
        ]
        click.echo(json.dumps(told))
    else:
        for query, row in answers:
            click.echo(f"{shown(query)}\n  rank  {name}  id")
            for rank, (each, score) in enumerate(row, start=1):
                click.echo(f"  {rank:>4}  {score:>{len(name)}.4f}  {shown(each)}")
    # Behind the answers, which are not lost where a picture cannot be drawn.
    if sheet or html:
        _draw(dataset, asked, found, sheet, html)
    for what, place in (("Picture", sheet), ("Page", html)):
        if place and not as_json:
            click.echo(f"{what}: {place}")
    end(context, len(asked.failed), asked.images)


def _draw(
    dataset: Dataset, asked: Queries, found: Neighbours, sheet: str | None, html: str | None
) -> None:
    from resfeat import downstream

    rows = downstream.tiles(asked, found, dataset.items(found.ids.ravel().tolist()))
    if sheet:
        downstream.write_picture(sheet, downstream.contact_sheet(rows))
    if html:
        about = f"{dataset.layout.root}: {dataset.record.identity.model}, {len(rows)} queries"
        page = downstream.contact_page(rows, "Nearest images", about)
        downstream.write_document(html, page.encode("utf-8", "replace"))
