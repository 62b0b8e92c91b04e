"""Every path inside an output folder, on a disk or in an object store.

OUT/
  README.md                       a dataset card: what this is, and which files are its rows
  page.html                       what `resfeat page` made of it, if nothing else was said
  embeddings/part-00000.parquet   one file per committed shard; its presence is the commit
  failures/part-00000.parquet     images of that shard that gave no embedding, if there are any
  _resfeat/
    spec.json                     identity, plan and origin of the dataset
    plan/plan-00000.parquet       the frozen listing
    checksums/part-00000.json     the note of a shard's commit: rows and digests of its files
    int8/network.xml, .bin        the network that precision int8 made of the weights
    index/<layer>/                index.faiss, ids.parquet and about.json, which names their digests
    runs/<run-id>.json            one report a run
    locks/<share>                 who is writing that share of the dataset now: all of it, or 2-of-4
    tmp/<share>/                  files that its writer has not published yet (not in a store)
"""

import os
import re
from pathlib import Path

from resfeat.storage import Fence, Location, locate

ALL = "all"  # the share of a run that writes all of a dataset
_PART = re.compile(r"part-(\d{5,})\.(?:parquet|json)")


class Layout:
    """The paths of one dataset. Makes nothing by itself."""

    def __init__(self, root: str | os.PathLike[str], share: str = ALL) -> None:
        self.root = locate(root)
        self.card = self.root / "README.md"
        self.page = self.root / "page.html"
        self.embeddings = self.root / "embeddings"
        self.failures = self.root / "failures"
        self.private = self.root / "_resfeat"
        self.spec = self.private / "spec.json"
        self.plan = self.private / "plan"
        self.checksums = self.private / "checksums"
        self.quantised = self.private / "int8" / "network.xml"
        self.runs = self.private / "runs"
        self.share = share  # what one run writes of the dataset, with a lock and drafts of its own
        self.lock = self.private / "locks" / share
        # In a store: what lets only the holder of the lock write.
        self.fence = Fence()
        # Where files are written before they are published; in a store that is in memory.
        private = self.private
        self.tmp = private / "tmp" / share if isinstance(private, Path) else self.fence

    @property
    def is_on_disk(self) -> bool:
        """Whether what is removed here is gone at once: in a store a request to remove something
        may arrive when it is another's."""
        return isinstance(self.root, Path)

    @property
    def folders(self) -> list[Location]:
        """Those that a dataset has from its beginning; the one that tells of it first."""
        always = [self.plan, self.embeddings, self.checksums, self.runs, self.lock.parent]
        return [*always, self.tmp] if isinstance(self.tmp, Path) else always

    @staticmethod
    def part_name(shard: int) -> str:
        """The file name of a shard's rows: it depends on the shard alone."""
        return f"part-{shard:05d}.parquet"

    def note(self, shard: int) -> Location:
        return self.checksums / f"part-{shard:05d}.json"

    def index(self, layer: str) -> Location:
        """The folder of the index of a layer."""
        return self.private / "index" / layer

    def run_report(self, run_id: str) -> Location:
        return self.runs / f"{run_id}.json"

    def shares(self) -> list[str]:
        """The shares that runs have held, or hold."""
        try:
            return sorted(path.name for path in self.lock.parent.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def committed(self) -> list[int]:
        """Numbers of the shards whose embeddings are in place, ascending."""
        return _numbers(self.embeddings)

    def with_failures(self) -> list[int]:
        """Numbers of the shards that have failure rows, ascending."""
        return _numbers(self.failures)

    def with_notes(self) -> list[int]:
        """Numbers of the shards that were committed once, or were about to be, ascending."""
        return _numbers(self.checksums)


def _numbers(folder: Location) -> list[int]:
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted({int(match[1]) for name in names if (match := _PART.fullmatch(name))})
