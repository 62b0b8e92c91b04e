"""resfeat bench"""

import json
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

from resfeat.cli import options
from resfeat.spec import FeatureSpec, RuntimeOptions, SourceOptions

EXAMPLES = """\b
Examples:
  resfeat bench photos
      How fast this machine reads, decodes, embeds and writes these images in fp32.
  resfeat bench photos --precision int8
      The same in int8.
  resfeat bench photos --model resnet18 --cpus-per-worker 4 --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@options.option(
    "--images", type=click.IntRange(1), default=256, help="Images in the sample, roughly."
)
@options.listing
@options.features
@options.placement
@options.as_json
@click.pass_context
def bench(context: click.Context, /, images: int, as_json: bool, **choices: Any) -> None:
    """Measure each stage on a sample of the images below SRC..., and name what limits the job.

    Nothing is kept. One worker is measured, in this process. Weights are random unless you give
    --weights: that makes no difference to the speed.
    """
    from resfeat.reporting.bench import bench as run

    if context.get_parameter_source("weights") is ParameterSource.DEFAULT:
        choices["weights"] = "random:0"
    measured = run(
        choices["sources"],
        FeatureSpec(**options.pick(choices, FeatureSpec)),
        RuntimeOptions(**options.pick(choices, RuntimeOptions)),
        SourceOptions(**options.pick(choices, SourceOptions)),
        images,
        on_step=lambda step: click.echo(f"{step} ...", err=True),
    )
    if as_json:
        click.echo(json.dumps(asdict(measured)))
        return
    place = measured.placement
    device = "a GPU and " if place.device == "cuda" else ""
    click.echo(
        f"{measured.images:,} images of {measured.megapixels:.1f} megapixels and "
        f"{measured.kilobytes:,.0f} kB on average, {measured.failed:,} of them broken; "
        f"{measured.precision} on {place.runtime}, {device}{place.cpus} CPU cores, batches of "
        f"{place.batch_size}\n\n{'':<10}{'images/s':>12}{'ms an image':>14}"
    )
    for stage in ("read", "decode", "forward", "write", "whole"):
        name, rate = "all of it" if stage == "whole" else stage, getattr(measured, stage)
        click.echo(f"{name:<10}{rate:>12,.1f}{1000 / rate:>14,.2f}")
    click.echo(f"\nThe model waited {measured.waited:.0%} of its time. {measured.sentence}")
