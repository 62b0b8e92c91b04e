"""resfeat models"""

import fnmatch
import json
from typing import Any

import click

from resfeat.backbones import FAMILIES, family_of, find, numbers, shapes
from resfeat.cli.progress import Lines
from resfeat.errors import UsageError

EXAMPLES = """\b
Examples:
  resfeat models
      Resfeat's own models.
  resfeat models resnet50
      One of them: its layers and their shapes, its weights and their preprocessing.
  resfeat models 'torchvision:*'
  resfeat models 'timm:convnext*'
      Those of torchvision and of timm (pip install 'resfeat[timm]') by pattern.
"""


@click.command(epilog=EXAMPLES)
@click.argument("pattern", metavar="[NAME]", default="*")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def models(pattern: str, as_json: bool) -> None:
    """List models, what they give and the names of their published weights; or show one."""
    with Lines() as lines:  # libraries of others take seconds to import
        lines.step(f"looking up {pattern}")
        names = _matching(pattern)
        rows = [_row(name) for name in names] if as_json or names == [pattern] else []
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        _show(*rows)
    else:
        _list(names)
        if pattern == "*":
            click.echo(
                "\nAlso: `resfeat models 'torchvision:*'`, `resfeat models 'timm:*'`, "
                "and `resfeat models NAME` for one with its layers"
            )


def _matching(pattern: str) -> list[str]:
    if pattern.rstrip(":") in FAMILIES:
        pattern = f"{pattern.rstrip(':')}:*"
    prefix, _, name = pattern.rpartition(":")
    found = fnmatch.filter(family_of(pattern).names(), name)
    if not found:
        find(pattern)  # raises an error that suggests similar names, unless it ends in a tag
    return [f"{prefix}:{each}" if prefix else each for each in found] or [pattern]


def _row(model: str) -> dict[str, Any]:
    """One model in plain values. GFLOPs are multiply-adds, as papers count them."""
    family, name = find(model)
    try:
        published = family.published(name)
        pixels = family.default_pixels(name)
        taps = shapes(model, pixels.crop)
        counts = numbers(model, pixels.crop)
    except UsageError as error:
        return {"model": model, "cannot": str(error)}
    return {
        "model": model,
        "dimension": list(taps.values())[-1][0],
        "parameters": counts.parameter_count(),
        "gflops": round(counts.gflops(pixels.crop), 3),
        "input": pixels.crop,
        "layers": {tap: list(shape) for tap, shape in taps.items()},
        "preprocessing": vars(pixels),
        "weights": {each.name: vars(each.preprocessing) for each in published.values()},
        "default": next(iter(published), None),
    }


def _list(names: list[str]) -> None:
    width = max(map(len, names))
    click.echo(f"{'model':<{width}}  dimension   parameters   GFLOPs  input  weights")
    for row in map(_row, names):  # line by line, since timm's and torchvision's take a while each
        if "cannot" in row:
            click.echo(f"{row['model']:<{width}}  not for resfeat: {row['cannot']}")
            continue
        weights = ", ".join(row["weights"]) or "none published"
        click.echo(
            f"{row['model']:<{width}}  {row['dimension']:>9,} {row['parameters']:>12,} "
            f"{row['gflops']:>8,.2f} {row['input']:>6}  {weights}"
        )
    click.echo("Parameters and GFLOPs (multiply-adds, one image) are without the classifier.")


def _show(row: dict[str, Any]) -> None:
    if "cannot" in row:
        raise UsageError(row["cannot"])
    click.echo(
        f"{row['model']}: {row['dimension']:,} dimensions, {row['parameters']:,} parameters and "
        f"{row['gflops']:,.2f} GFLOPs (multiply-adds, one image) without the classifier"
    )
    click.echo("\nlayer       shape, for --layers (a feature map is pooled to its first number)")
    for tap, shape in row["layers"].items():
        click.echo(f"{tap:<10}  {' x '.join(map(str, shape))}")
    click.echo("\nweights, for --weights (the first is DEFAULT)")
    for name, pixels in row["weights"].items():
        click.echo(f"{name:<16}  {_words(pixels)}")
    if not row["weights"]:
        click.echo(f"none published: give a file, or random:SEED; {_words(row['preprocessing'])}")


def _words(pixels: dict[str, Any]) -> str:
    mean, std = (", ".join(f"{value:g}" for value in pixels[name]) for name in ("mean", "std"))
    return (
        f"resize {pixels['resize']}, crop {pixels['crop']}, {pixels['interpolation']}, "
        f"mean {mean}, std {std}"
    )
