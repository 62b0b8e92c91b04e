"""What can go wrong, in two kinds: a bad image is data, a bad run is an exception.

An image that gives no embedding becomes a `Failure`, a row of `failures/`. Anything that stops the
run is a `ResfeatError` whose message is one line: it names the thing and the next step. What both
kinds tell, and whatever else is told of addresses, goes without secrets.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Stage = Literal["read", "decode", "embed"]

# The closed list: every failure row carries one of these, so users can filter and count on them.
Reason = Literal[
    "not_found", "permission", "not_regular_file", "io_error", "empty", "unidentified",
    "format_not_allowed", "truncated", "corrupt", "too_large", "too_many_pixels", "timeout",
    "decoder_crash", "out_of_memory", "non_finite", "duplicate_id", "bad_container",
]  # fmt: skip
REASONS: tuple[str, ...] = get_args(Reason)

# What may hold a secret: the user of an address, but for the container of Azure's
# abfss://CONTAINER@ACCOUNT; any query of the web; and what an address in a store is signed with. A
# password may have a slash in it, while after HOST:PORT/ an "@" is one of a file's name.
_USER = re.compile(
    r"(?i)^(?!(?:az|abfss?)://[^:/?#]*@)"
    r"([a-z][a-z0-9+.-]*://)(?:[^/?#]*|[^:/?#]*:(?!\d*/)\S*)@"
)
_IN_TEXT = re.compile(r"(?i)[a-z][a-z0-9+.-]*://(?:(?![a-z][a-z0-9+.-]*://)\S)*")
_WEB = re.compile(r"(?i)https?://")
_SIGNED = re.compile(r"(?i)[?&][^/?&=]*(sig|token|secret|credential|key|pass)[^/?&=]*=")


@dataclass(frozen=True)
class Failure:
    """Why one image gave no embedding."""

    stage: Stage
    reason: Reason
    message: str


class ResfeatError(Exception):
    """The run failed. The command prints the message and exits with 1."""

    exit_code = 1


class ChoiceError(ResfeatError):
    """What was chosen does not work out on these images: the next step is another choice, so a
    dataset that was just begun with this one is not kept."""


class UsageError(ChoiceError):
    """The command cannot be carried out as it was given. Exit code 2."""

    exit_code = 2


def no_embedding(failed: Mapping[str, Failure]) -> UsageError:
    """What says of one or more images, by name, that none of them gives an embedding."""
    name, why = next(iter(failed.items()))
    told = f"{name}: {why.reason}, {why.message}"
    if len(failed) == 1:
        return UsageError(f"cannot embed {told}; give another image, or mend this one")
    return UsageError(
        f"none of the {len(failed):,} images gives an embedding, the first is {told}; give others, "
        "or mend these"
    )


class StoreError(ResfeatError):
    """An object store is out of reach, or refuses."""


class DeviceLostError(ResfeatError):
    """A GPU failed under a worker, whose process can use none any more. Another may."""


class Stopped(ResfeatError):  # noqa: N818 (it is no error of anybody's)
    """The run was asked to stop and did; the same command resumes it."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def public(name: str) -> str:
    """The name of a file or folder without secrets: of an address, no password and no signature."""
    address = _USER.sub(r"\1", name.strip())
    if _WEB.match(address):
        return re.split(r"[?#]", address)[0]
    if "://" not in address:
        return name
    return address.partition("?")[0] if _SIGNED.search(address) else address


def public_text(text: str) -> str:
    """A text, such as a message, with each address in it as `public` has it."""
    return _IN_TEXT.sub(lambda found: public(found[0]), text)


def missing(what: str, library: str, extra: str, otherwise: str = "") -> UsageError:
    """What to raise where something needs a library that only comes with an extra of ours.
    otherwise: what else can be done, as in ", or give --map pca"."""
    return UsageError(
        f"{what} needs {library}, which is not installed: {install(extra)}{otherwise}"
    )


def install(extra: str) -> str:
    """How to get what comes with an extra."""
    return f"pip install 'resfeat[{extra}]'"


class DecoderHungError(Exception):
    """An image has kept a worker's decoder for so long that the worker must be given up."""
