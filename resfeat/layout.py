"""Every path inside an output folder.

OUT/
  embeddings/part-00000.parquet   one file per committed shard; its presence is the commit
  failures/part-00000.parquet     images of that shard that gave no embedding, if there are any
  _resfeat/
    spec.json                     identity, plan and origin of the dataset
    plan/plan-00000.parquet       the frozen listing
    int8/network.xml, .bin        the network that precision int8 made of the weights
    runs/<run-id>.json            one report a run
    tmp/                          parts being written
    lock                          who is writing now
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_PART = re.compile(r"part-(\d{5,})\.parquet")


class Layout:
    """The paths of one dataset. Makes nothing by itself."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self.embeddings = self.root / "embeddings"
        self.failures = self.root / "failures"
        self.private = self.root / "_resfeat"
        self.spec = self.private / "spec.json"
        self.plan = self.private / "plan"
        self.quantised = self.private / "int8" / "network.xml"
        self.runs = self.private / "runs"
        self.tmp = self.private / "tmp"
        self.lock = self.private / "lock"

    @staticmethod
    def part_name(shard: int) -> str:
        """The file name of a shard's rows: it depends on the shard alone."""
        return f"part-{shard:05d}.parquet"

    def plan_file(self, number: int) -> Path:
        return self.plan / f"plan-{number:05d}.parquet"

    def run_report(self, run_id: str) -> Path:
        return self.runs / f"{run_id}.json"

    def committed(self) -> list[int]:
        """Numbers of the shards whose embeddings are in place, ascending."""
        return _numbers(self.embeddings)

    def with_failures(self) -> list[int]:
        """Numbers of the shards that have failure rows, ascending."""
        return _numbers(self.failures)


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _PART.fullmatch(name)))
