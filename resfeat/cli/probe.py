"""resfeat probe"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from resfeat.cli import options, shown
from resfeat.errors import UsageError

if TYPE_CHECKING:
    from resfeat.downstream.learning import Labelled
    from resfeat.downstream.learning.probe import Measured, Method

MOST_CONFUSED = 3
EXAMPLES = """\b
Examples:
  resfeat probe embeddings
      By the labels of `extract --label-from parent`: learn from 80 %, test with the rest.
  resfeat probe embeddings --label breed --folds 5 --picture confusion.png
      By a column that `extract --keep breed` carried; each image is tested once.
  resfeat probe resnet50 convnext --save species
      Two datasets of the same images: each alone, and both side by side. `resfeat predict` applies
      what is saved.
"""


@click.command(epilog=EXAMPLES)
@click.argument("outputs", metavar="OUT...", nargs=-1, required=True)
@click.option(
    "--label", metavar="COL", default="label", show_default=True,
    help="The column with the classes: `label`, one that was kept, or one of --labels.",
)  # fmt: skip
@click.option(
    "--labels", metavar="F.csv", help="A CSV file with a column `id` and the column of classes."
)
@click.option(
    "--test", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of each class to test with; the rest is learned from.  [default: 0.2]",
)  # fmt: skip
@click.option(
    "--folds", type=click.IntRange(min=2),
    help="Instead: test each image once, by what was learned from the other folds.",
)  # fmt: skip
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="Of k-NN.")
@click.option(
    "--layer", metavar="NAME,...", type=options.Names(),
    help="Which embedding of a dataset with several: one, or one for each dataset.  "
    "[default: the last]",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the splits.")
@click.option(
    "--picture", metavar="F.png", type=click.Path(dir_okay=False),
    help="Draw the confusion matrix of the logistic regression.",
)  # fmt: skip
@click.option(
    "--save", metavar="FOLDER",
    help="Save the logistic regression, learned once more from all images.",
)  # fmt: skip
@options.as_json
def probe(
    outputs: tuple[str, ...], label: str, labels: str | None, test: float | None,
    folds: int | None, k: int, layer: tuple[str, ...] | None, seed: int, picture: str | None,
    save: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure how well the embeddings of the dataset OUT tell classes apart, by k-NN and logistic
    regression on images that they did not learn from.

    Several datasets of the same images are an ensemble: each is measured alone, and all with their
    vectors side by side. Needs scikit-learn: pip install 'resfeat[probe]'
    """
    from resfeat.downstream.learning import (
        check_target,
        confusion_picture,
        gather,
        labels_of,
        labels_of_file,
        open_views,
    )
    from resfeat.downstream.learning import probe as probing
    from resfeat.downstream.pictures import check_picture, write_picture

    if folds and test:
        raise UsageError("--test tests once and --folds each image: give one of them")
    if save is not None:
        check_target(save)
    if picture:
        check_picture(picture)
    datasets, views = open_views(outputs, layer or ())
    found = labels_of_file(labels, label) if labels else labels_of(datasets, label)
    _say("reading the embeddings")
    data = gather(datasets, views, found)
    method = probing.Method(folds, test or 0.2, k, seed)
    measured = probing.measure(data, method, _say)
    about = {
        "label": label,
        "images": len(data.which),
        "method": asdict(method) if folds is None else {**asdict(method), "test": None},
        "scores": [asdict(score) for score in measured.scores],
    }
    if as_json:
        left_out, matrix = asdict(data.left_out), measured.confusion.tolist()
        more = {"classes": data.classes, "left_out": left_out, "confusion": matrix}
        click.echo(json.dumps(about | more))
    else:
        _print(data, measured, method)
    if picture:
        write_picture(picture, confusion_picture(measured.confusion, data.classes))
        click.echo(f"Picture: {picture}", err=as_json)
    if save is not None:
        _say("learning from all images")
        probing.learn(data).save(save, about)
        click.echo(f"Probe: {save}", err=as_json)


def _say(step: str) -> None:
    click.echo(f"{shown(step)} ...", err=True)


def _print(data: Labelled, measured: Measured, method: Method) -> None:
    how = f"{method.folds} folds" if method.folds else f"{measured.tested:,} of them to test with"
    click.echo(f"{len(data.which):,} images in {len(data.classes):,} classes, {how}")
    if told := str(data.left_out):
        click.echo(shown(f"Left out: {told}"))
    shots = list(measured.scores[0].few_shot)
    names = [shown(score.embeddings) for score in measured.scores]
    width = max(map(len, [*names, "embeddings"]))
    few = "".join(f"{f'{count} a class':>12}" for count in shots)
    click.echo(f"\n{'embeddings':<{width}}  {'dims':>6}  {'classifier':<20}{'top-1':>8}"
               f"{'spread':>9}{'top-5':>9}{few}")  # fmt: skip
    for name, score in zip(names, measured.scores, strict=True):
        cells = [(score.spread, 9), (score.top5, 9), *((score.few_shot[n], 12) for n in shots)]
        rest = "".join(f"{'-' if value is None else f'{value:.4f}':>{w}}" for value, w in cells)
        click.echo(
            f"{name:<{width}}  {score.dims:>6,}  {score.classifier:<20}{score.top1:>8.4f}{rest}"
        )
    if pairs := measured.most_confused(MOST_CONFUSED):
        told = ", ".join(
            f"{data.classes[true]} taken for {data.classes[guess]} ({count:,})"
            for true, guess, count in pairs
        )
        click.echo(f"\nMost often wrong, by the last: {shown(told)}")
