"""What a run would do."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from resfeat.dataset import Dataset

if TYPE_CHECKING:
    from resfeat.plan import Changes


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a run would find and do. items: images in the dataset then, or in
    the partition of it. images: those that it would
    read, at most. shards: those that it would commit. rate: images per second of the last run that
    embedded any; None if there is none. refusal: why it would not be done at all."""

    output: str
    items: int
    images: int
    shards: int
    update: Changes | None = None
    rate: float | None = None
    refusal: str | None = None

    @property
    def seconds(self) -> float | None:
        """How long that takes, at the rate of the last run."""
        return self.images / self.rate if self.rate else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 1) if self.seconds else None}


def last_rate(dataset: Dataset) -> float | None:
    """Images per second of the last run that embedded any, by the reports; None if none says."""
    for place in reversed(dataset.runs()):
        with suppress(OSError, ValueError, KeyError, TypeError):  # reports may be anything by now
            if (rate := float(json.loads(place.read_bytes())["images_per_second"])) > 0:
                return rate
    return None
