"""Options that several commands share: which features to make, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

Command = Callable[..., Any]


class Count(click.ParamType):  # type: ignore[type-arg]
    """A number; "auto" becomes None."""

    name = "auto|N"

    def convert(
        self, value: object, param: click.Parameter | None, context: click.Context | None
    ) -> int | None:
        if value in (None, "auto"):
            return None
        try:
            return int(str(value))
        except ValueError:
            self.fail(f"'{value}' is neither a number nor auto", param, context)


class Auto(click.Choice[str]):
    """One of several names; "auto" becomes None."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        return None if value in (None, "auto") else super().convert(value, param, context)


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _names(
    context: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(","))


features = _all(
    click.option("--model", default="resnet50", show_default=True, help="See `resfeat models`."),
    click.option(
        "--weights",
        default="DEFAULT",
        show_default=True,
        help="DEFAULT or another published name; a .pth, .pt or .safetensors file, or its s3://, "
        "gs:// or https:// address; or random:SEED.",
    ),
    click.option(
        "--layers",
        metavar="NAME,...",
        callback=_names,
        help="Layers to store, one column each; see `resfeat models MODEL`.  [default: the last]",
    ),
    click.option(
        "--pool",
        type=click.Choice(["avg", "max", "gem"]),
        help="How a feature map becomes a vector.  [default: avg, or the model's own way]",
    ),
    click.option("--normalize", is_flag=True, help="Scale each embedding to unit length (L2)."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16"]),
        default="float32",
        show_default=True,
        help="Type of the stored values.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
        default="fp32",
        show_default=True,
        help="Precision of the forward pass.",
    ),
    click.option("--resize", type=int, help="Short side in pixels.  [default: the weights' own]"),
    click.option(
        "--crop", type=int, help="Side of the centre crop in pixels.  [default: the weights' own]"
    ),
    click.option(
        "--interpolation",
        type=click.Choice(["nearest", "bilinear", "bicubic"]),
        help="How to resize.  [default: the weights' own]",
    ),
    click.option(
        "--decode",
        type=click.Choice(["turbo", "pillow"]),
        default="turbo",
        show_default=True,
        help="turbo: several times faster (libjpeg-turbo, torch); pillow: torchvision's pixels to "
        "the last bit.",
    ),
)
placement = _all(
    click.option(
        "--runtime",
        type=Auto(["auto", "torch", "openvino"]),
        default="auto",
        show_default=True,
        help="What runs the network. auto: OpenVINO for our own networks on x86 CPUs, else torch.",
    ),
    click.option(
        "--batch-size",
        type=Count(),
        default="auto",
        show_default=True,
        help="Images in one forward pass.",
    ),
    click.option(
        "--gpus-per-worker",
        type=float,
        help="Share of a GPU for each worker, 0 to 1.  [default: 1 if there is a GPU]",
    ),
    click.option("--cpus-per-worker", type=int, help="Cores for each.  [default: a fair share]"),
)


def pick(choices: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The choices that are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in choices.items() if name in names}
