"""The command line: one file a command, each of which imports what it needs when it runs."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from resfeat import __version__
from resfeat.cli import config
from resfeat.errors import ResfeatError, UsageError

COMMANDS = (
    "extract", "status", "verify", "search", "index", "duplicates", "probe", "predict",
    "page", "export", "models", "bench", "doctor",
)  # fmt: skip

# The object of a command's context: whether this process is the command's own, as when a shell
# starts it, or goes on afterwards, as `call` has it. Of others nothing is known.
OWN_PROCESS, GOES_ON = object(), object()


class Group(click.Group):
    """Loads a command when it is named, and turns our errors into one line and an exit code."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        if args is None:  # then they are those that this process was started with
            options.setdefault("obj", OWN_PROCESS)
        return super().main(args, *more, **options)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"resfeat.cli.{name}"), name)
        return command

    def invoke(self, context: click.Context) -> object:
        try:
            _check_current_folder()
            with config.named():
                return super().invoke(context)
        except ResfeatError as error:
            click.echo(f"Error: {shown(str(error))}", err=True)
            leave(context, error.exit_code)


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the folder that you are in was deleted: change to another") from error


def shown(text: str) -> str:
    """The text with its control characters escaped, so that it cannot act on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def leave(context: click.Context, code: int) -> NoReturn:
    """Exit, even where a thread of this process hangs in a decoder, or while it joins Ray: Python
    would wait for it. A process that goes on is not left."""
    for thread in threading.enumerate() if context.obj is not GOES_ON else ():
        if thread.name.startswith(("load", "ray-init")):
            thread.join(timeout=1)
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    context.exit(code)


def call(*words: str) -> int:
    """Run a command in this process, which goes on afterwards; gives the exit code. For scripts:
    signals reach the one process that there is, and nothing outlives it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = main(list(words), prog_name="resfeat", standalone_mode=False, obj=GOES_ON)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code or 0  # a command that does not leave gives none


@click.group(
    cls=Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "auto_envvar_prefix": config.PREFIX,  # RESFEAT_SEARCH_K, and so on
    },
    epilog="Start with: resfeat extract photos -o embeddings",
)
@click.version_option(__version__, prog_name="resfeat", allow_from_autoenv=False)
def main() -> None:
    """Turn folders full of images into ResNet embeddings in Parquet."""
