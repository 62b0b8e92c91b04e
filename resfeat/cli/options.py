"""Options that several commands share: which features to make, and where."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, get_args

import click

from resfeat.spec import Decode, DType, Interpolation, Pool, Precision, RuntimeName

Command = Callable[..., Any]


class Count(click.ParamType[int | None]):
    """A number; "auto" becomes None."""

    name = "count"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        try:
            return None if value == "auto" else int(value)
        except ValueError:
            self.fail(f"'{value}' is neither a number nor auto", param, ctx)


class Names(click.ParamType[tuple[str, ...]]):
    """Names with commas between them, or a list of them."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        return tuple(name.strip() for name in value.split(",")) if value else ()


option = partial(click.option, show_default=True)
dataset = click.argument("output", metavar="OUT")
layer = click.option(
    "--layer",
    metavar="NAME",
    help="Which embedding of a dataset with several.  [default: the last]",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
count = partial(option, type=Count(), default="auto", metavar="AUTO|N")


def switch(name: str, **more: Any) -> Callable[[Command], Command]:
    """An option that is on or off. What a file or a variable has on, `--no-` and its name turns
    off."""
    return click.option(f"--{name}/--no-{name}", **more)


def _choice(name: str, known: Any, **more: Any) -> Callable[[Command], Command]:
    return option(name, type=click.Choice(get_args(known)), **more)


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


features = _all(
    option("--model", default="resnet50", help="See `resfeat models`."),
    option(
        "--weights",
        default="DEFAULT",
        help="DEFAULT or another published name; a .pth, .pt or .safetensors file, or its s3://, "
        "gs:// or https:// address; or random:SEED.",
    ),
    option(
        "--layers",
        type=Names(),
        metavar="NAME,...",
        help="Layers to store, one column each; see `resfeat models MODEL`.  [default: the last]",
    ),
    _choice(
        "--pool",
        Pool,
        help="How a feature map becomes a vector.  [default: avg, or the model's own way]",
    ),
    switch("normalize", help="Scale each embedding to unit length (L2)."),
    _choice("--dtype", DType, default="float32", help="Type of the stored values."),
    _choice("--precision", Precision, default="fp32", help="Precision of the forward pass."),
    option("--resize", type=int, help="Short side in pixels.  [default: the weights' own]"),
    option(
        "--crop", type=int, help="Side of the centre crop in pixels.  [default: the weights' own]"
    ),
    _choice("--interpolation", Interpolation, help="How to resize.  [default: the weights' own]"),
    _choice(
        "--decode",
        Decode,
        default="turbo",
        help="turbo: several times faster (libjpeg-turbo, torch); pillow: torchvision's pixels to "
        "the last bit.",
    ),
)
listing = _all(
    option(
        "--label-from",
        type=click.Choice(["parent"]),
        help="Label each image with its folder's name.",
    ),
    option(
        "--keep",
        type=Names(),
        metavar="NAME,...",
        callback=lambda context, param, value: value or (),
        help="Columns of tables, or files beside an image in a tar (json, txt, cls), to store with "
        "the embeddings.",
    ),
    option(
        "--uri-column",
        metavar="NAME",
        help="Of tables: the column of paths or addresses.  [default: uri, url, path, ...]",
    ),
    option(
        "--image-column",
        metavar="NAME",
        help="Of Parquet and Arrow: the column of images.  [default: the one with bytes]",
    ),
    option(
        "--id-column",
        metavar="NAME",
        help="Of either: the column that becomes the id.  [default: the address, or file#row]",
    ),
)
placement = _all(
    option(
        "--runtime",
        type=click.Choice(["auto", *get_args(RuntimeName)]),
        default="auto",
        callback=lambda context, param, value: None if value == "auto" else value,
        help="What runs the network. auto: OpenVINO for our own networks on x86 CPUs, else torch.",
    ),
    count(
        "--batch-size",
        help="Images in one forward pass. On a GPU that is 256, and this a multiple of it.",
    ),
    option(
        "--gpus-per-worker",
        type=float,
        help="Share of a GPU for each worker, 0 to 1.  [default: about two cores to a worker, and "
        "at most eight workers to a GPU]",
    ),
    option("--cpus-per-worker", type=int, help="Cores for each.  [default: a fair share]"),
)


def pick(choices: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The choices that are fields of a dataclass."""
    return {each.name: choices[each.name] for each in fields(kind) if each.name in choices}
