"""resfeat search"""

import json

import click

from resfeat.cli import shown
from resfeat.errors import ResfeatError, UsageError

EXAMPLES = """\b
Examples:
  resfeat search embeddings photos/cat.jpg
  resfeat search embeddings cat.jpg dog.jpg -k 5 --sheet nearest.png
  resfeat search embeddings cat.jpg --json | jq '.[0].neighbours[0].id'
"""


@click.command(epilog=EXAMPLES)
@click.argument("output", metavar="OUT")
@click.argument("queries", metavar="QUERY...", nargs=-1, required=True)
@click.option(
    "-k", default=10, show_default=True, type=click.IntRange(min=1), help="How many to find."
)
@click.option(
    "--layer",
    metavar="NAME",
    help="Which embedding of a dataset with several.  [default: the last]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, an object a query.")
@click.option(
    "--sheet", metavar="F.png", type=click.Path(dir_okay=False),
    help="Draw queries and finds as a picture.",
)  # fmt: skip
def search(
    output: str, queries: tuple[str, ...], k: int, layer: str | None, as_json: bool,
    sheet: str | None,
) -> None:  # fmt: skip
    """Find the images of the dataset OUT that are nearest to the image files QUERY...

    Exact cosine over all rows. A query is embedded as the dataset's own images were.
    """
    from resfeat import downstream
    from resfeat.dataset import open_dataset

    dataset = open_dataset(output)
    if not dataset.commits().embedded:
        raise UsageError(f"{output} has no embeddings yet: see `resfeat status {output}`")
    vectors = downstream.embed_queries(dataset, queries, layer)
    found = downstream.search(dataset, vectors, k, layer)
    if sheet:
        items = dataset.items([neighbour.id for row in found for neighbour in row])
        try:
            downstream.contact_sheet(queries, found, items).save(sheet)
        except (OSError, ValueError) as error:
            message = f"cannot write {sheet}: {error}; give a path that ends in .png"
            raise ResfeatError(message) from error
    answers = list(zip(queries, found, strict=True))
    if as_json:
        told = [{"query": query, "neighbours": list(map(vars, row))} for query, row in answers]
        click.echo(json.dumps(told))
        return
    for query, row in answers:
        click.echo(f"{query}\n  rank  cosine  id")
        for rank, neighbour in enumerate(row, start=1):
            click.echo(f"  {rank:>4}  {neighbour.cosine:.4f}  {shown(neighbour.id)}")
    if sheet:
        click.echo(f"Picture: {sheet}")
