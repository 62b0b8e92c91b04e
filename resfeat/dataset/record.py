"""`_resfeat/spec.json`: what a dataset is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from resfeat.dataset.documents import write_json
from resfeat.dataset.layout import Layout
from resfeat.errors import ResfeatError
from resfeat.plan import Plan
from resfeat.spec import Identity

FORMAT = 4


@dataclass(frozen=True, kw_only=True)
class Record:
    """`_resfeat/spec.json`: what the dataset is. Written once, when its plan is complete.

    weights: what to give as --weights to find the same weights again. parity: how near to the
    reference a sample of the embeddings was when it was first measured; None for the reference.
    quantised: the digest of the network that int8 embeddings come from; None for others.
    """

    identity: Identity
    weights: str
    sources: tuple[str, ...]
    label_from: str | None
    plan: Plan
    created: str
    versions: Mapping[str, str]
    parity: Mapping[str, float] | None = None
    quantised: str | None = None

    def save(self, layout: Layout) -> None:
        content = {
            "format": FORMAT,
            "fingerprint": self.identity.fingerprint,
            **asdict(self),
        }
        write_json(layout, layout.spec, content)

    @classmethod
    def load(cls, layout: Layout) -> Record | None:
        """The record of the dataset at `layout`; None where there is none."""
        try:
            content = json.loads(layout.spec.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ResfeatError(f"cannot read {layout.spec}: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ResfeatError(
                f"{layout.root} was written by another version of resfeat: read it with that one"
            )
        try:
            fingerprint = content.pop("fingerprint")
            content["identity"] = Identity.from_dict(content["identity"])
            if content["identity"].fingerprint != fingerprint:
                raise ValueError("its fingerprint is not that of its identity")
            content["plan"] = Plan.from_dict(content["plan"])
            content["sources"] = tuple(content["sources"])
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ResfeatError(f"{layout.spec} is damaged ({error}): restore it") from error
