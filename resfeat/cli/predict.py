"""resfeat predict"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from resfeat.cli import shown
from resfeat.cli.failed import end, tell_failed
from resfeat.errors import UsageError

if TYPE_CHECKING:
    from resfeat.downstream.learning import Predictions

EXAMPLES = """\b
Examples:
  resfeat predict species embeddings -o predicted.parquet
      The class of each image of a dataset, and its probability.
  resfeat predict species cat.jpg dog.jpg
      Of image files, which are embedded as the dataset was that the probe learned from.
  resfeat predict ensemble resnet50 convnext --json
      By a probe of two datasets: give both.
"""


@click.command(epilog=EXAMPLES)
@click.argument("probe", metavar="PROBE")
@click.argument("targets", metavar="OUT|IMAGE...", nargs=-1, required=True)
@click.option(
    "-o", "--output", metavar="F.parquet", type=click.Path(dir_okay=False),
    help="Write them to a Parquet file: id, label, probability.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, an object an image.")
@click.pass_context
def predict(
    context: click.Context, probe: str, targets: tuple[str, ...], output: str | None, as_json: bool
) -> None:
    """Say what class images are of, by a PROBE that `resfeat probe --save` made: all rows of the
    dataset OUT, or image files.

    Of several files those that give no embedding are told and passed over. Exits with 3 if they are
    more than 5 %, as extract does, and with 2 if none gives one.
    """
    from resfeat.downstream.learning import Classifier, Predictions, open_targets, write_predictions

    if output and as_json:
        raise UsageError("--output writes a file and --json prints: give one of them")
    classifier = Classifier.load(probe)
    datasets = open_targets(targets)
    if datasets:
        found = Predictions.of_datasets(classifier, datasets)
    else:
        found = Predictions.of_images(classifier, targets)
        tell_failed(found.failed)
    if output:
        click.echo(f"Predictions: {write_predictions(output, found):,} in {output}")
    elif as_json:
        _print_json(found)
    else:
        _print(found)
    if found.left_out:
        click.echo(f"left out: {found.left_out:,} images not in every dataset", err=True)
    end(context, len(found.failed), len(set(targets)))


def _print_json(found: Predictions) -> None:
    """One array, an object a line, as they come."""
    start = "["
    for batch in found:
        for row in batch.to_pylist():
            click.echo(f"{start}{json.dumps(row)}", nl=False)
            start = ",\n"
    click.echo("[]" if start == "[" else "]")


def _print(found: Predictions) -> None:
    click.echo("probability  label  id")
    for batch in found:
        width = max(len(shown(name)) for name in batch["label"].to_pylist())
        for row in batch.to_pylist():
            label = f"{shown(row['label']):<{width}}"
            click.echo(f"{row['probability']:>11.4f}  {label}  {shown(row['id'])}")
