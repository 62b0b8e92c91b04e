"""What a dataset is, as its `_resfeat/spec.json` says."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from resfeat import __version__
from resfeat.dataset.layout import Layout
from resfeat.errors import ResfeatError, UsageError, first_line
from resfeat.plan import Plan
from resfeat.spec import Identity, SourceOptions
from resfeat.storage import remove, write_json, write_whole

FORMAT = 6


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a dataset is. Written when its plan is complete."""

    identity: Identity
    weights: str  # what to give as --weights to find the same weights again
    sources: tuple[str, ...]
    source_options: SourceOptions
    plan: Plan
    created: str
    versions: Mapping[str, str]
    # How near a sample was to the reference when that was first measured; None for the reference.
    parity: Mapping[str, float] | None = None
    quantised: str | None = None  # the digest of the network that int8 embeddings come from

    def save(self, layout: Layout) -> None:
        # The mark is another one each time, so that what is there is never taken for what was.
        mark = secrets.token_hex(8)
        about = {"format": FORMAT, "fingerprint": self.identity.fingerprint, "mark": mark}
        write_json(layout.tmp, layout.spec, about | asdict(self))

    def check_same(self, layout: Layout, asked: Self) -> None:
        """Raise UsageError, naming the field, where a run asks for another kind of embeddings, or
        for another listing."""
        there, now = self._choices(), asked._choices()
        for name, value in there.items():
            if value != now[name]:
                raise UsageError(
                    f"{layout.root} was made with another {name}: {_brief(value)} there, "
                    f"{_brief(now[name])} now (weights {self.weights} there, {asked.weights} now); "
                    "repeat its choices to resume it, or give a new -o"
                )

    def _choices(self) -> dict[str, object]:
        identity = vars(self.identity) | vars(self.identity.preprocessing)
        del identity["preprocessing"]
        others = {"sources": self.sources, "shard_size": self.plan.shard_size}
        return identity | vars(self.source_options) | others

    @staticmethod
    def forget(layout: Layout) -> None:
        """From now on there is no record. In a store an empty object stays: see `Fence`."""
        if isinstance(layout.spec, Path):
            remove(layout.spec)
        else:
            write_whole(layout.tmp, layout.spec, b"")

    @classmethod
    def load(cls, layout: Layout) -> Self | None:
        """The record of a dataset; None where there is none."""
        try:
            content = json.loads(layout.spec.read_bytes() or "null")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise ResfeatError(f"cannot read {layout.spec} ({reason}): restore it") from error
        if content is None and not isinstance(layout.spec, Path):
            return None
        try:
            if (its_format := content.pop("format")) != FORMAT:
                raise ResfeatError(
                    f"{layout.root} has format {its_format}, of resfeat "
                    f"{content['versions']['resfeat']}, and this is resfeat {__version__}, which "
                    f"reads format {FORMAT}: extract it again with a new -o, or use that version"
                )
            fingerprint = content.pop("fingerprint")
            content.pop("mark", None)
            content["identity"] = Identity.from_dict(content["identity"])
            if content["identity"].fingerprint != fingerprint:
                raise ValueError("its fingerprint is not that of its identity")
            content["plan"] = Plan.from_dict(content["plan"])
            content["sources"] = tuple(content["sources"])
            asked = content["source_options"]
            content["source_options"] = SourceOptions(**asked | {"keep": tuple(asked["keep"])})
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ResfeatError(f"{layout.spec} is damaged ({error}): restore it") from error


def _brief(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
