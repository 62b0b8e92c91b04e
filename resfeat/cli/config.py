"""What a job is told without a command line: variables, and the file of `--config`.

Click looks options up there by itself. This module reads the file, names what is wrong in either,
and says afterwards where each value came from.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource

from resfeat.cli.options import Count, Names
from resfeat.errors import UsageError, first_line

PREFIX = "RESFEAT"

# What Kubernetes gives each container for a service that is called resfeat, or resfeat-head-svc.
_OF_A_SERVICE = re.compile(
    rf"{PREFIX}_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_[A-Z]+(_(PROTO|PORT|ADDR))?)?)"
)
# The types of TOML that an option takes, by its own type, and what to tell who gave another.
_TAKES: dict[type[Any], tuple[tuple[type[Any], ...], str]] = {
    click.types.BoolParamType: ((bool,), "true or false"),
    click.types.IntParamType: ((int,), "a whole number"),
    click.types.FloatParamType: ((int, float), "a number"),
    Count: ((int, str), 'a whole number or "auto"'),
    Names: ((str, list), "a list of strings"),
}
_FROM = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.DEFAULT: "default",
}


def _load(context: click.Context, param: click.Parameter, file: str | None) -> str | None:
    """Look at the variables, and have the file give defaults: before any other option is looked
    up, since this one is eager."""
    _check_variables(context)
    if file is not None:
        context.default_map = _read(context.command, file)
    return file


option = click.option(
    "--config",
    metavar="FILE.toml",
    is_eager=True,
    callback=_load,
    help='A file of options, of lines such as model = "resnet18"; see above.',
)


def _check_variables(context: click.Context) -> None:
    """Raise UsageError for a variable that no option has. Those of other commands have the names
    of these in them."""
    known = [_variable(context, param) for param in context.command.params]
    group = context.parent.command if context.parent else None
    others = group.list_commands(context) if isinstance(group, click.Group) else []
    names = (name.upper().replace("-", "_") for name in others if name != context.info_name)
    elsewhere = tuple(f"{PREFIX}_{name}_" for name in names)
    for name in sorted(os.environ):
        if not name.startswith(f"{PREFIX}_") or name in known or name.startswith(elsewhere):
            continue
        if not _OF_A_SERVICE.fullmatch(name):
            raise UsageError(f"unknown variable {name}: the nearest is {_nearest(name, known)}")


def _read(command: click.Command, file: str) -> dict[str, Any]:
    """The options that a file gives, by the names that Click has for them."""
    try:
        with open(file, "rb") as opened:
            content = tomllib.load(opened)
    except OSError as error:
        raise UsageError(f"cannot read --config {file}: {error.strerror}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise UsageError(f"--config {file} is no TOML: {first_line(error)}") from error
    known = {str(param.name): param for param in command.params if param.name != "config"}
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            nearest = _nearest(name, known).replace("_", "-" if "-" in key else "_")
            raise UsageError(f"{file}: unknown key {key}: the nearest is {nearest}")
        if name in found:
            raise UsageError(f"{file}: {key} is there twice, also with the other dash: drop one")
        if told := _misfit(known[name], value):
            raise UsageError(f"{file}: {key}: give {told}")
        found[name] = value
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {each.lower(): each for each in known}
    return lower[difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0)[0]]


def _misfit(param: click.Parameter, value: object) -> str | None:
    """What an option takes, where this value of a file is none of it. Click would make something
    of most: of 224.5 a whole number."""
    kinds: tuple[type[Any], ...] = (str,)
    told = "a string"
    if param.nargs == -1:
        kinds, told = (list,), "a list of strings"
    for kind, takes in _TAKES.items():
        if isinstance(param.type, kind):
            kinds, told = takes
    fits = type(value) in kinds
    if isinstance(value, list):
        fits = fits and all(type(each) is str for each in value)
    return None if fits else told


def _variable(context: click.Context, param: click.Parameter) -> str:
    if isinstance(param.envvar, str):
        return param.envvar
    return f"{context.auto_envvar_prefix}_{str(param.name).upper()}"


@contextmanager
def named() -> Iterator[None]:
    """Have an error of Click name the variable or the key that has the value. For one on the
    command line it names the option."""
    try:
        yield
    except click.BadParameter as error:
        if not (error.ctx and error.param and error.param.name):
            raise
        source = error.ctx.get_parameter_source(error.param.name)
        if source is ParameterSource.ENVIRONMENT:
            place = _variable(error.ctx, error.param)
        elif source is ParameterSource.DEFAULT_MAP:
            place = f"{error.ctx.params['config']}: {error.param.name}"
        else:
            raise
        raise UsageError(f"{place}: {first_line(error)}") from error


def in_force(context: click.Context) -> dict[str, dict[str, Any]]:
    """Each option's value and where it comes from, in plain values without secrets."""
    from resfeat.storage import public

    def plain(value: object) -> object:
        if isinstance(value, tuple):
            return list(map(plain, value))
        return public(value) if isinstance(value, str) else value

    names = [str(param.name) for param in context.command.params]
    sources = {name: context.get_parameter_source(name) for name in names}
    return {
        name: {"value": plain(context.params[name]), "from": _FROM[source]}
        for name, source in sources.items()
        if source is not None
    }
