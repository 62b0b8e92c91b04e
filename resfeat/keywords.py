"""What people type in a notebook: the fields of the specs as keywords."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from resfeat.errors import UsageError
from resfeat.spec import (
    Decode,
    DType,
    ExtractSpec,
    FeatureSpec,
    Interpolation,
    Pool,
    Precision,
    RuntimeName,
    RuntimeOptions,
)

Address = str | os.PathLike[str]  # a path, or an address in a store or on the web


class FeatureKeywords(TypedDict, total=False):
    """As `FeatureSpec` says."""

    model: str
    weights: Address
    layers: str | Sequence[str] | None
    pool: Pool | None
    normalize: bool
    precision: Precision
    dtype: DType
    resize: int | None
    crop: int | None
    interpolation: Interpolation | None
    decode: Decode


class PlaceKeywords(TypedDict, total=False):
    """As `RuntimeOptions` says of one process. runtime: its name, or all of the options."""

    runtime: RuntimeName | RuntimeOptions | None
    batch_size: int | None
    gpus_per_worker: float | None
    cpus_per_worker: int | None


class EmbedderKeywords(FeatureKeywords, PlaceKeywords, total=False):
    """What an `Embedder` is made with."""


class ExtractKeywords(FeatureKeywords, PlaceKeywords, total=False):
    """As `ExtractSpec` says, and `RuntimeOptions`."""

    workers: int | None
    address: str | None
    label_from: Literal["parent"] | None
    keep: str | Sequence[str]
    uri_column: str | None
    image_column: str | None
    id_column: str | None
    shard_size: int | None
    max_error_rate: float
    retry_failed: bool
    update: bool
    max_gone: float
    partition: str | None
    min_parity: float | None


def check_names(call: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError, with the nearest that there is, for a keyword that a call does not have."""
    known = sorted(known)
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0)[0]
            raise UsageError(f"{call} has no keyword '{name}': did you mean '{nearest}'?")


def feature_spec(given: Mapping[str, Any]) -> FeatureSpec:
    """The features among the keywords."""
    return FeatureSpec(**_of(FeatureSpec, given))


def runtime_options(given: Mapping[str, Any]) -> RuntimeOptions:
    """How to run, of the keywords. Those beside `runtime=RuntimeOptions(...)` come before its."""
    options = _of(RuntimeOptions, given)
    if isinstance(whole := options.get("runtime"), RuntimeOptions):
        del options["runtime"]
        return replace(whole, **options)
    return RuntimeOptions(**options)


def extract_spec(
    sources: Address | Sequence[Address], output: Address, given: Mapping[str, Any]
) -> ExtractSpec:
    """The extraction that is asked for by keywords."""
    several = [sources] if isinstance(sources, str | os.PathLike) else sources
    options = _of(ExtractSpec, given) | {"runtime": runtime_options(given)}
    try:
        paths = tuple(os.fspath(each) for each in several)
    except TypeError as error:
        raise UsageError(f"{sources!r} is no source: give a path, or a list of some") from error
    return ExtractSpec(sources=paths, output=os.fspath(output), **options)


def _of(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that are fields of a spec, in its types."""
    own = {each.name: given[each.name] for each in fields(kind) if each.name in given}
    for name in ("layers", "keep"):
        if name in own:
            own[name] = _names(name, own[name])
    if isinstance(weights := own.get("weights"), os.PathLike):
        own["weights"] = os.fspath(weights)
    hints = get_type_hints(kind)
    return {name: _of_type(name, value, hints[name]) for name, value in own.items()}


def _names(name: str, given: Any) -> tuple[str, ...] | None:
    """One name, or several."""
    if given is None:
        return None
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable) or not all(isinstance(each, str) for each in given):
        raise UsageError(f"{name}={given!r}: give a name, or a list of some")
    return tuple(given)


# What is told of each type that a single value may have, and what is taken for it.
TOLD: Mapping[Any, tuple[str, type]] = {
    bool: ("True or False", bool),
    int: ("a whole number", Integral),
    float: ("a number", Real),
    str: ("a string", str),
    NoneType: ("None", NoneType),
}


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """A single value as one of Python's own. Raises UsageError for another type than its field has.
    Names, of which a spec tells what they may be, and several values are left to that."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = [str if get_origin(part) is Literal else part for part in parts]
    if hint is str or not set(types) <= TOLD.keys() or isinstance(value, RuntimeOptions):
        return value
    # A bool is an int, but True workers are nobody's wish.
    taken = tuple(TOLD[each][1] for each in types)
    if not (bool in types if isinstance(value, bool) else isinstance(value, taken)):
        raise UsageError(f"{name}={value!r}: give {' or '.join(TOLD[each][0] for each in types)}")
    if isinstance(value, Integral):  # numpy's are none of int, which JSON wants
        return value if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, Real) else value
