"""What commands that go on without images say of these, and what they exit with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from resfeat.cli import leave, shown
from resfeat.spec import ExtractSpec

if TYPE_CHECKING:
    from resfeat.errors import Failure

TOO_MANY_FAILED = 3


def tell_failed(failed: Mapping[str, Failure]) -> None:
    """A line for each image that gave no embedding."""
    for number, (name, failure) in enumerate(failed.items(), start=1):
        told = f"{failure.reason}, {failure.message}"
        click.echo(f"Skipped, {number:,} so far: {shown(f'{name}: {told}')}", err=True)


def end(context: click.Context, failed: int, images: int) -> None:
    """Leave as `extract` does where a larger share of the images failed than it bears."""
    most = ExtractSpec.max_error_rate
    if images and failed / images > most:
        told = f"{failed:,} of {images:,} images gave no embedding, more than {most:.0%}"
        click.echo(f"Error: {told}: see above", err=True)
        leave(context, TOO_MANY_FAILED)
