"""resfeat duplicates"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from resfeat.cli import options, shown
from resfeat.cli.progress import Lines

if TYPE_CHECKING:
    from resfeat.dataset import Dataset
    from resfeat.downstream.duplicates import Group
    from resfeat.downstream.index import Index

EXAMPLES = """\b
Examples:
  resfeat duplicates embeddings
  resfeat duplicates embeddings --threshold 0.99 --out duplicates.parquet
  resfeat duplicates embeddings --html duplicates.html
"""

SHOWN, MEMBERS = 20, 4
# Of more images all pairs take hours.
MANY = 200_000


@click.command(epilog=EXAMPLES)
@options.dataset
@options.option(
    "--threshold", type=float, default=0.95,
    help="Images with at least this cosine are linked. Random weights need one near 1.",
)  # fmt: skip
@options.layer
@options.option("--exact", is_flag=True, help="Compare all pairs, also where there is an index.")
@options.option(
    "--out", "table", metavar="F.parquet", type=click.Path(dir_okay=False),
    help="Write a row for each image of a group.",
)  # fmt: skip
@options.option(
    "--html", metavar="F", type=click.Path(dir_okay=False),
    help="Write one page to look at, with small pictures in it.",
)  # fmt: skip
@options.as_json
def duplicates(
    output: str, threshold: float, layer: str | None, exact: bool, table: str | None,
    html: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Find groups of images in the dataset OUT that are the same, or nearly so.

    A group is what a cosine of --threshold links, directly or by way of others. Of each one is to
    be kept: the largest picture. Nothing is removed. An image is "exact" if its file has the same
    bytes as the kept one, read again to know it, and "equal" if the embedding is the same, and the
    file is another or cannot be read any more. Copies are looked for among images of the same
    embedding, bit for bit, and the same size: such as were embedded on different devices may differ
    in their last bits, and are only near. A fresh index (`resfeat index`) is used where there is
    one; it may miss a few.
    """
    from resfeat import downstream
    from resfeat.dataset import open_dataset

    dataset = open_dataset(output)
    for path in filter(None, (table, html)):
        downstream.check_place(path)
    with Lines() as lines:
        index = None if exact else _index(dataset, layer, lines)
        groups = downstream.find_duplicates(dataset, threshold, layer, index, lines.step)
        if unread := [each for group in groups for each in group.members if each.unread]:
            lines.note(
                f"{len(unread):,} images cannot be read any more to say whether they are exact "
                f"copies; they count as equal at most ({unread[0].id}: {unread[0].unread})"
            )
    # What may have taken hours is told before anything is written that may fail.
    if as_json:
        told = {
            "dataset": str(dataset.layout.root),
            "threshold": threshold,
            "index": index.about.kind if index else None,
            "groups": [{"keep": group.members[0].id, **asdict(group)} for group in groups],
        }
        click.echo(json.dumps(told))
    else:
        _tell(groups)
    if table:
        downstream.write_groups(groups, table)
        click.echo(f"Table: {table}", err=as_json)
    if html:
        with Lines() as lines:
            lines.step("drawing the page")
            _draw(dataset, groups, threshold, html)
        click.echo(f"Page: {html}", err=as_json)


def _draw(dataset: Dataset, groups: Sequence[Group], threshold: float, html: str) -> None:
    from resfeat import downstream

    rows, headings = downstream.duplicate_tiles(groups, dataset.items)
    about = f"{dataset.layout.root}: {len(groups):,} groups, linked by a cosine of {threshold:g}"
    if len(rows) < len(groups):
        about += f"; the largest {len(rows):,} are shown"
    page = downstream.contact_page(rows, "Duplicates", about, headings)
    downstream.write_document(html, page.encode("utf-8", "replace"))


def _index(dataset: Dataset, layer: str | None, lines: Lines) -> Index | None:
    """The index to find neighbours by; None, and why, where there is none that can be used."""
    from resfeat.downstream.index import usable_index

    index, why = usable_index(dataset, layer)
    if why:
        lines.note(f"{why}; all pairs are compared")
    elif not index and dataset.commits().embedded > MANY:
        lines.note("all pairs are compared, which takes long: make an index with `resfeat index`")
    return index


def _tell(groups: Sequence[Group]) -> None:
    if not groups:
        click.echo("No duplicates")
        return
    click.echo("images  least cosine  keep, and its duplicates")
    for group in groups[:SHOWN]:
        least = f"{'>' if group.is_bound else ''}{group.least_cosine:.4f}"
        first, *others = group.members
        click.echo(f"{len(group.members):>6,}  {least:>12}  {shown(first.id)}")
        for each in others[:MEMBERS]:
            copy = f", a copy of {each.copy_of}" if each.copy_of not in (None, first.id) else ""
            click.echo(f"{'':>6}  {each.near(first):>12}    {shown(each.id + copy)}")
        if len(others) > MEMBERS:
            click.echo(f"{'':>22}and {len(others) - MEMBERS:,} more")
    if len(groups) > SHOWN:
        click.echo(f"and {len(groups) - SHOWN:,} more groups: --out, --html or --json have them")
    extra = sum(len(group.members) - 1 for group in groups)
    exact = sum(each.copy_of is not None for group in groups for each in group.members)
    click.echo(
        f"{len(groups):,} groups; {extra:,} images beside those to keep, {exact:,} of them exact "
        "copies of a file"
    )
