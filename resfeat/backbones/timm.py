"""timm's networks, headless, and the weights that it publishes. An extra: `resfeat[timm]`."""

import math
from functools import cache, partial
from typing import Any

from torch import Tensor

from resfeat.backbones import Published
from resfeat.backbones.backbone import Adapted, Backbone
from resfeat.errors import ResfeatError, UsageError, first_line, missing
from resfeat.spec import Preprocessing

try:
    import timm
    from timm.data import resolve_data_config
except ImportError as error:
    raise missing("--model timm:NAME", "timm", "timm") from error


@cache
def names() -> list[str]:
    return list(timm.list_models())


def has(name: str) -> bool:
    """A name may end in the tag of its weights, as in resnet50.a1_in1k."""
    return name in names() or name in timm.list_pretrained(f"{name.partition('.')[0]}.*")


def build(name: str, crop: int) -> Backbone:
    network = timm.create_model(name, pretrained=False, num_classes=0)
    classifier = timm.get_pretrained_cfg_value(name, "classifier") or ()
    return Adapted(network, (classifier,) if isinstance(classifier, str) else classifier, {})


def published(name: str) -> dict[str, Published]:
    """By timm's tags, the default one first; for a name with a tag, only that one."""
    architecture, _, tag = name.partition(".")
    default = timm.get_pretrained_cfg(name)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if default is None or default.tag not in tags:
        return {}
    # Some weights of a network may want other pictures than centre crops: they are left out.
    centred = [each for each in tags if _centred(_config(f"{architecture}.{each}"))]
    found = {}
    for each in (tag,) if tag else (default.tag, *centred):
        full = f"{architecture}.{each}"
        found[each] = Published(each, default_pixels(full), partial(_read, full))
    return found


def default_pixels(name: str) -> Preprocessing:
    config = _config(name)
    _, height, width = config["input_size"]
    if not _centred(config):
        raise UsageError(
            f"timm:{name} wants pictures of {height} x {width} made by '{config['crop_mode']}'; "
            "resfeat only crops the centre, to a square: choose another model"
        )
    return Preprocessing(
        # timm's own formula, rounding included.
        resize=math.floor(height / config["crop_pct"]),
        crop=height,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def _config(name: str) -> dict[str, Any]:
    return dict(resolve_data_config(pretrained_cfg=vars(timm.get_pretrained_cfg(name))))


def _centred(config: dict[str, Any]) -> bool:
    _, height, width = config["input_size"]
    return bool(config["crop_mode"] == "center" and height == width)


def _read(name: str) -> dict[str, Tensor]:
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    # The errors of the hub's client have no common class.
    except Exception as error:
        raise ResfeatError(
            f"cannot get the weights {timm.get_pretrained_cfg(name).hf_hub_id} of the Hugging Face "
            f"hub ({first_line(error)}): fetch them into the Hugging Face cache, or give "
            "--weights PATH"
        ) from error
    return dict(network.state_dict())
