"""A collection of pictures that changes between two runs, and what a dataset of it must hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from broken import encode
from PIL import Image

from resfeat.dataset import Layout

SIZE = 6144  # bytes of a file, so that another picture may have the same
# A child that decodes with care, as after a kill, imports torch for "turbo": two seconds each.
FEATURES = ["--model", "cifar_resnet20", "--weights", "random:1", "--decode", "pillow",
            "--runtime", "torch"]  # fmt: skip
SMALL = ["--shard-size", 4, "--batch-size", 4, "--workers", 0, "--max-error-rate", 1]


def picture(number: int, size: int = SIZE) -> bytes:
    """A picture of chance. What stands behind its end means nothing."""
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    large = Image.fromarray(pixels).resize((48, 40))
    return encode(large, "JPEG").ljust(size, b"\0")


def no_picture(number: int) -> bytes:
    return f"{number} is not a picture".encode().ljust(SIZE, b"\0")


@dataclass
class Changed:
    """Names, as an update of the folder must count them."""

    added: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)

    @property
    def to_read(self) -> set[str]:
        return self.added | self.changed


class Collection:
    """A folder of pictures. Each file that is written gets a time of its own."""

    def __init__(self, folder: Path, count: int, seed: int = 0) -> None:
        self.folder = folder
        self.good: set[str] = set()
        self.bad: set[str] = set()
        self.gone: list[str] = []
        self._chance = Random(seed)
        self._written = self._named = 0
        for number in range(count):
            self.put(self._new_name(), is_good=number % 7 != 3)

    @property
    def names(self) -> set[str]:
        return self.good | self.bad

    def put(self, name: str, *, is_good: bool = True, size: int = SIZE) -> None:
        """Another picture at this place, or what is none, whatever was there."""
        self._written += 1
        make = picture(self._written, size) if is_good else no_picture(self._written)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make)
        when = (1_700_000_000 + self._written) * 10**9
        os.utime(path, ns=(when, when))
        (self.good if is_good else self.bad).add(name)
        (self.bad if is_good else self.good).discard(name)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()
        self.good.discard(name)
        self.bad.discard(name)
        self.gone.append(name)

    def change(self) -> Changed:
        """Whatever can happen to files, each to some of them: no file has two fates at once."""
        good, bad = (self._chance.sample(sorted(kind), len(kind)) for kind in (self.good, self.bad))
        made = Changed()
        if self.gone and self._chance.random() < 0.8:
            name = self.gone.pop(self._chance.randrange(len(self.gone)))
            self.put(name, is_good=self._chance.random() < 0.8)
            made.added.add(name)
        for _ in range(self._chance.randint(1, 5)):
            name = self._new_name()
            self.put(name, is_good=self._chance.random() < 0.9)
            made.added.add(name)
        fates = {"same size": 2, "other size": 1, "broken": 1, "touched": 1}
        for fate, most in fates.items():
            for _ in range(self._chance.randint(0, most)):
                name = good.pop()
                size = SIZE + self._chance.randint(1, 99) if fate == "other size" else SIZE
                if fate == "touched":
                    self._touch(name)
                else:
                    self.put(name, is_good=fate != "broken", size=size)
                made.changed.add(name)
        for is_good in (True, False)[: len(bad)]:  # one is mended, another broken in another way
            name = bad.pop()
            self.put(name, is_good=is_good)
            made.changed.add(name)
        for kind in (good, good, bad[:1])[: self._chance.randint(1, 3)]:
            if kind:
                name = kind.pop()
                self.remove(name)
                made.removed.add(name)
        return made

    def _touch(self, name: str) -> None:
        when = (self.folder / name).stat().st_mtime_ns + 1_000_000
        os.utime(self.folder / name, ns=(when, when))

    def _new_name(self) -> str:
        self._named += 1
        return f"{'abc'[self._named % 3]}/{self._chance.randrange(10**6):06} {self._named}.jpg"

    @contextmanager
    def concealed(self, names: Iterable[str]) -> Iterator[None]:
        """Within it whoever reads one of these files finds the contrary of what it was: no picture
        where one was listed, and a picture where none was. Size and time tell nobody."""
        before = {self.folder / name: (self.folder / name).stat() for name in names}
        contents = {path: path.read_bytes() for path in before}
        for path, content in contents.items():
            is_bad = str(path.relative_to(self.folder)) in self.bad
            path.write_bytes(picture(0) if is_bad else b"?" * len(content))
            assert path.stat().st_size == len(content)
        self._as_of(before)
        yield
        for path, content in contents.items():
            path.write_bytes(content)
        self._as_of(before)

    def _as_of(self, before: dict[Path, os.stat_result]) -> None:
        for path, status in before.items():
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def every_row(output: Path) -> dict[str, dict[str, object]]:
    """All columns of all rows in both folders, each embedding as its bits, by folder and id."""
    found: dict[str, dict[str, object]] = {"embeddings": {}, "failures": {}}
    for kind, those in found.items():
        for part in sorted((output / kind).glob("*.parquet")):
            for row in rows_of(pq.read_table(part)):
                assert row["id"] not in found["embeddings"].keys() | found["failures"].keys()
                those[row["id"]] = row
    return found


def rows_of(table: pa.Table) -> list[dict[str, object]]:
    rows = table.to_pylist()
    for row in rows:
        if "embedding" in row:
            row["embedding"] = np.asarray(row["embedding"], np.float32).tobytes()
        row |= {name: "NaN" for name, value in row.items() if value != value}
    return rows


def parts_of(output: Path) -> dict[str, str]:
    """In which part each id is."""
    parts = [part for kind in ("embeddings", "failures") for part in (output / kind).glob("*.*")]
    return {each: part.name for part in parts for each in pq.read_table(part)["id"].to_pylist()}


def content(output: Path) -> dict[str, tuple[int, bytes]]:
    """What lies in a dataset, and when it was written; less the reports and the locks."""
    return {
        str(path.relative_to(output)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.parent.name not in ("runs", "locks")
    }


def last_report(output: Path) -> dict[str, object]:
    reports = Layout(output).runs.iterdir()
    return json.loads(max(reports, key=lambda path: path.stat().st_mtime_ns).read_text())
