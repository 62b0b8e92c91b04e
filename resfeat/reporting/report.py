"""The run report: what a run did, how fast, and what held it back."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from resfeat import __version__
from resfeat.reporting import limits
from resfeat.runtimes.hardware import hardware

if TYPE_CHECKING:
    from resfeat.fidelity import Parity
    from resfeat.plan import Changes
    from resfeat.storage import Location

ANY = "any"  # partition, or none
# A shorter run is hardly more than its first batches, which nothing was ready for.
LEAST_SECONDS = 1.0
LIBRARIES = "torch torchvision openvino nncf pillow pillow-heif simplejpeg pyarrow ray".split()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one run did, and where the dataset stands after it.

    items, embedded, failed, reasons: the whole dataset, or the partition of it that the run was to
    do. images, images_failed: this run alone, in shards that it committed. kept: images in those
    whose rows stayed. changed: files that were not as listed any more when they were read.
    bytes_read: of images, this run.
    start_seconds: until the first worker is live. seconds: from then to the last commit. stages:
    busy seconds by stage, added up over threads and workers; `wait` is the time that the model
    waited for pixels. skipped: files that were passed over in listing, by extension. parity: how
    near a sample was to the reference; None for the reference itself. course: images per second by
    worker, in spans of equal length that make up `seconds`. update: what an update found;
    `open_dataset(...).changes` has the ids. options: of the command, by name: each one's `value`,
    and whether it is `from` the command line, the environment, the file of --config, or the
    default. A password or a signature in an address is left out. retried: of a run that tried
    failures again and did not come to its end, the shards that it has done, and those that it went
    on from.
    """

    run_id: str
    status: Literal["finished", "interrupted", "failed"]
    output: str
    precision: str
    items: int
    embedded: int
    failed: int
    reasons: Mapping[str, int]
    images: int = 0
    images_failed: int = 0
    kept: int = 0
    changed: int = 0
    bytes_read: int = 0
    shards: int = 0
    shards_left: int = 0
    start_seconds: float = 0.0
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    course: Mapping[str, Sequence[float]] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    parity: Parity | None = None
    partition: str | None = None
    retried: Sequence[int] = ()
    update: Changes | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    error: str | None = None

    @property
    def images_per_second(self) -> float:
        """Of this run, from the first live worker to the last commit."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def error_rate(self) -> float:
        """Share of the dataset's items that gave no embedding, 0 to 1."""
        return self.failed / self.items if self.items else 0.0

    @property
    def bottleneck(self) -> str | None:
        """The stage that decided the speed: read, decode, embed or write. None if nothing ran."""
        if not self.engine:
            return None
        return limits.bottleneck(self.stages, self.engine["cpus"], self.engine["reads_ahead"])

    @property
    def waited(self) -> float:
        """Share of its time, 0 to 1, that the model waited for pixels."""
        return limits.waited(self.stages)

    @property
    def verdict(self) -> str | None:
        """A sentence on what limited the run, or that it was too short to tell. None if nothing
        ran."""
        if (stage := self.bottleneck) is None:
            return None
        if self.seconds < LEAST_SECONDS:
            return f"too short to tell what limited it: less than {LEAST_SECONDS:g} s"
        engine = self.engine
        more = limits.helps(stage, engine["device"], self.precision, engine["cpus"])
        waited = f"the model waited {self.waited:.0%} of its time"
        if enough := limits.enough(self.stages, engine, self.seconds):
            waited += f", and {enough} of {engine['workers']} workers would do"
        return f"limited by: {stage} ({waited}); faster with {more}"

    def as_dict(self) -> dict[str, Any]:
        """The report as it is written to `_resfeat/runs/`."""
        return {
            **asdict(self),
            "images_per_second": round(self.images_per_second, 2),
            "bottleneck": self.bottleneck,
            "waited": round(self.waited, 4),
            "verdict": self.verdict,
            "hardware": hardware(),
            "versions": versions(),
        }


def retried(runs: Sequence[Location], partition: str | None) -> frozenset[int]:
    """Shards of which the last run has tried the failures again, if it did not come to its end.

    runs: the reports of a dataset, the oldest first. partition: the runs of which count, as it is
    called in them; ANY: the last of each.
    """
    found: dict[str | None, frozenset[int]] = {}
    for place in reversed(runs):
        with suppress(OSError, ValueError, KeyError, TypeError):  # reports may be anything by now
            report = json.loads(place.read_bytes())
            name = report["partition"]
            if name not in found and partition in (ANY, name):
                found[name] = frozenset(map(int, report.get("retried", ())))
        if partition in found:
            break
    return frozenset().union(*found.values())


def versions() -> dict[str, str]:
    """Of Python and of the libraries that an embedding or a run depends on."""
    ours = {"python": platform.python_version(), "resfeat": __version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # some are extras
            ours[name] = version(name)
    return ours
