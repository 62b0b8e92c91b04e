"""Checkpoints: read from paths, the web and object stores, without running code from them.

A training script's file holds more than the network: a `state_dict`, a prefix before every name,
two copies of the network, an optimizer. The network is found by the names that it must have.
"""

import argparse
import io
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import torch
from torch import Tensor

from resfeat.errors import ResfeatError, StoreError, UsageError, first_line
from resfeat.storage import SCHEMES, StorePath, is_remote, public, web

SUFFIXES = (".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".tar")

# Where training scripts put the network; first the copy that is meant for use: averaged weights
# before the last ones, DINO's teacher before its student.
CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict",
              "model", "module", "ema", "teacher", "student", "network", "net", "backbone",
              "encoder")  # fmt: skip
# Prefixes of the copy that is meant for use, where a file holds two: MoCo's query encoder.
PREFERRED = ("encoder_q", "base_encoder", "teacher", "online_encoder", "ema_model")


def is_checkpoint(weights: str) -> bool:
    """Whether this names a file or an address, rather than published weights."""
    named = "://" in weights or weights.lower().endswith(SUFFIXES)
    return named or Path(weights).expanduser().is_file()


def origin_of(source: str) -> str:
    """Where a checkpoint is, as it may be written down: without secrets."""
    return public(source) if "://" in source else str(Path(source).expanduser().absolute())


def _split(source: str) -> SplitResult:
    try:
        return urlsplit(source) if "://" in source else SplitResult("", "", source, "", "")
    except ValueError as error:
        raise UsageError(f"weights: an address that cannot be read ({error})") from error


def read_tensors(source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint, by name, and the containers in which they were found.

    source: a path or a URI (http, https, s3, gs, az). Raises UsageError if there is no such file,
    ResfeatError if it cannot be read or holds anything but tensors.
    """
    data = _fetch(source)
    try:
        content = _parse(data, _split(source).path)
    # The readers' errors for broken and hostile files have no common class.
    except Exception as error:
        raise ResfeatError(
            f"cannot read weights {origin_of(source)}: {_reason(error)}; only plain tensors are "
            "loaded, code in a checkpoint is never run: if it is your own, save "
            "`model.state_dict()` again"
        ) from error
    opened: list[str] = []
    while isinstance(content, dict) and (
        inner := next((key for key in CONTAINERS if isinstance(content.get(key), dict)), None)
    ):
        opened.append(inner)
        content = content[inner]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for name, tensor in content.items()
    ):
        raise ResfeatError(
            f"weights {origin_of(source)} hold no state dict that can be recognised: save "
            "`model.state_dict()` and give that"
        )
    return {name: tensor.detach() for name, tensor in content.items()}, opened


def strip(
    tensors: Mapping[str, Tensor], expected: Collection[str], head: tuple[str, ...]
) -> tuple[dict[str, Tensor], str, list[str]]:
    """The network's tensors under their own names, the prefix that they had, and what was left out.

    expected: the names that the network must have. head: modules of its classifier. Tensors that
    look like the network's are kept even if they do not fit, for the error message.
    """
    prefix = _prefix(tensors, expected)
    # Without numbers: `layer5` looks like a part of a network that has four layers.
    parts = {_part(name) for name in expected}
    heads = tuple(f"{module}." for module in head)
    kept: dict[str, Tensor] = {}
    left_out: dict[str, None] = {}
    for name, tensor in tensors.items():
        own = name[len(prefix) :]
        if not name.startswith(prefix):
            left_out[_label(name, prefix)] = None
        elif own in expected or (_part(own) in parts and not own.startswith(heads)):
            kept[own] = tensor
        elif not own.startswith(heads):
            left_out[prefix + own.partition(".")[0]] = None
    return kept, prefix, list(left_out)


def _part(name: str) -> str:
    return name.partition(".")[0].rstrip("0123456789")


def _label(name: str, prefix: str) -> str:
    """A name for a tensor outside the network: "queue", or "module.queue" beside "module.net."."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if prefix.startswith(f"{first}.") else first


def _prefix(tensors: Mapping[str, Tensor], expected: Collection[str]) -> str:
    found = Counter(
        name[:start]
        for name in tensors
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in expected
    )
    # A copy that lacks a few tensors is still a copy: it must not lose to the wrong one.
    copies = {prefix: count for prefix, count in found.items() if count > len(expected) / 2}
    order = {prefix: (_rank(prefix), -count) for prefix, count in copies.items()}
    meant = [prefix for prefix in order if order[prefix] == min(order.values())]
    if len(meant) > 1:
        raise ResfeatError(
            f"the weights hold {len(meant)} copies of the network, under {', '.join(meant)}: save "
            "the one that is meant"
        )
    return meant[0] if meant else ""


def _rank(prefix: str) -> int:
    words = prefix.split(".")
    return next((n for n, word in enumerate(PREFERRED) if word in words), len(PREFERRED))


def _reason(error: Exception) -> str:
    # torch goes on to advise loading such a file with code and all.
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {code[1]} to be called"
    if isinstance(error, pickle.UnpicklingError):
        return "it is no checkpoint, or holds more than tensors"
    return first_line(error)


def _parse(data: bytes, path: str) -> Any:
    if path.lower().endswith(".safetensors"):
        from safetensors.torch import load

        return load(data)
    # Training scripts save their options as a Namespace, which runs nothing when it is read.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old pickles and slow checks
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _fetch(source: str) -> bytes:
    scheme, host, *_ = _split(source)
    try:
        if not scheme:
            return Path(source).expanduser().read_bytes()
        if f"{scheme}://" in web.WEB:
            if "@" in host:
                raise UsageError(
                    f"weights {origin_of(source)}: a password in an address is not sent; give an "
                    "address that needs none, or a path"
                )
            return web.get(source)[0]
        if is_remote(source):
            return StorePath.of(source).read_bytes()
        known = ", ".join((*web.WEB, *(f"{each}://" for each in SCHEMES)))
        raise UsageError(
            f"weights {origin_of(source)}: {scheme}:// is not read; give a path or {known}"
        )
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"weights file {origin_of(source)} does not exist") from error
    except StoreError as error:  # which says where, and what to do
        told = first_line(error).removeprefix(f"{StorePath.of(source)}: ")
        raise ResfeatError(f"cannot read weights {origin_of(source)}: {told}") from error
    except (OSError, ValueError) as error:
        hint = "check its address, your credentials and the network" if scheme else "check it"
        raise ResfeatError(
            f"cannot read weights {origin_of(source)}: {first_line(error)}; {hint}"
        ) from error
