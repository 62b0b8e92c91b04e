"""The index of a dataset: what it is, whether it is still that of the dataset, and search by it.

It lies in `OUT/_resfeat/index/<layer>/`:

    index.faiss   FAISS opens it without us; it finds numbers of rows
    ids.parquet   faiss_id, id, shard, row in its part, and a hash of the vector, by faiss_id
    about.json    what it was made of, and the digests of both: the index is there if this is
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.dataset import digests_of
from resfeat.downstream.index.kinds import COARSE, KINDS, Kind, asked_of, faiss, prepared
from resfeat.downstream.index.ranking import RANKED_PAIRS, Listed, of_dataset, of_index, ranked
from resfeat.downstream.search import Metric, Neighbours, check_k, check_vectors, nearest
from resfeat.errors import ResfeatError, first_line

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

FAISS, IDS, ABOUT = "index.faiss", "ids.parquet", "about.json"
# Format 1 had no rows in `ids.parquet`, and of codes the recall of the codes alone.
FORMAT, OLD_FORMATS = 2, (1,)
# Of larger files only the beginning and the end are checked: reading them would take as long as an
# exact search.
CHECKED_BYTES = 512 << 20
# How many times as many rows FAISS is asked for where more are equally near than it gave.
MORE = 16
# How far a cosine, or the square of a distance in shares of lengths, may be off in float32.
ROUNDING = 1e-6
# To read a row by itself and compare it takes as long as exact search takes to read so many, one
# after another; and it reads one while it compares one with so many queries. Of 20,000 rows of 512
# and 2,048 values these were 5 to 14, and 58 and 39.
ALONE, TOGETHER = 10, 50


@dataclass(frozen=True)
class Measured:
    """How a search by it did on rows that were held out, when it was made. recall_at_10: the share
    of their ten nearest, by exact search, that it found; None for fewer than five rows. seconds: a
    query, as one of all that were asked together; exact_seconds: the same by exact search, which
    reads the dataset."""

    rows: int
    queries: int
    recall_at_10: float | None
    seconds: float
    exact_seconds: float
    generation: int


@dataclass(frozen=True, kw_only=True)
class About:
    """What an index is. asked: whether its kind was asked for; parts: the digest of each
    part that it has the rows of, by shard; changed: rows that came or went since it was made;
    files: digests of its files; effort: how hard a search tries, as `kinds.set_effort` has it."""

    layer: str
    kind: Kind
    why: str
    asked: bool
    metric: Metric
    dim: int
    rows: int
    trained_on: int
    effort: int
    fingerprint: str
    generation: int
    parts: Mapping[int, str]
    measured: Measured
    next_id: int
    changed: int = 0
    files: Mapping[str, str]
    format: int = FORMAT

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What an index says of itself; None where there is none. Raises ResfeatError where it
        cannot be understood."""
        path = folder / ABOUT
        try:
            content = json.loads(path.read_bytes())
            if content["format"] not in (FORMAT, *OLD_FORMATS) or content["kind"] not in KINDS:
                raise ValueError("of another version of resfeat")
            content["parts"] = {int(shard): each for shard, each in content["parts"].items()}
            content["measured"] = Measured(**content["measured"])
            about = cls(**content)
            if set(about.files) != {FAISS, IDS}:
                raise ValueError("it names other files")
            return about
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(path, error) from error


def damaged(path: Path, error: object) -> ResfeatError:
    why = first_line(error) if isinstance(error, BaseException) else error
    return ResfeatError(f"{path} is damaged ({why}): `resfeat index` makes it anew")


def open_index(dataset: Dataset, layer: str | None = None) -> Index | None:
    """The index of a layer, the last by default; None where there is none, or OUT is in a store.

    Raises ResfeatError where it is damaged, UsageError for a layer that the dataset does not have.
    """
    name = dataset.layer_of(layer)
    folder = dataset.layout.index(name)
    about = About.load(folder) if isinstance(folder, Path) else None
    return Index(dataset, name, folder, about) if about and isinstance(folder, Path) else None


def usable_index(
    dataset: Dataset, layer: str | None = None, metric: Metric = "cosine"
) -> tuple[Index | None, str]:
    """The index of a layer if it can be searched for that metric and is that of the dataset as it
    stands; else why not, in one line, which is empty where there is none."""
    dataset.check_layer(layer)
    try:
        index = open_index(dataset, layer)
        if index is None or index.stale:
            why = f"{index.stale}: `resfeat index` brings it up to date" if index else ""
            return None, why
        if index.about.metric != metric:
            return None, f"the index is for {index.about.metric}, and not for {metric}"
        index.check()
        faiss()
    except ResfeatError as error:
        return None, str(error)
    return index, ""


class Index:
    """An index of a dataset. `stale`: why it is not that of the dataset as it stands, or None."""

    def __init__(self, dataset: Dataset, layer: str, folder: Path, about: About) -> None:
        self._dataset, self._layer, self._folder = dataset, layer, folder
        self.about = about
        self.stale = self._stale()
        self._checked: dict[str, tuple[int, int, int]] = {}  # which file it was, by its name

    def _stale(self) -> str | None:
        about, record = self.about, self._dataset.record
        if about.format != FORMAT:
            return "the index was made by an older resfeat"
        if about.fingerprint != record.identity.fingerprint:
            return (
                f"the index is of embeddings with the fingerprint {about.fingerprint[:12]}, and "
                f"these have {record.identity.fingerprint[:12]}"
            )
        if about.layer != self._layer:
            return f"the index is of the layer {about.layer}, and not of {self._layer}"
        now, then = digests_of(self._dataset.layout), about.parts
        if now == then:
            return None
        count = sum(now.get(shard) != then.get(shard) for shard in {*now, *then})
        return (
            f"the index is older than the dataset, of which {count:,} of {len(now):,} parts have "
            "changed since"
        )

    def search(self, queries: NDArray[np.float32], k: int = 10) -> Neighbours:
        """The k nearest images to each query, float32 [Q, D], or to one, [D], nearest first.

        What an index of codes (sq8, pq) finds is read in the dataset and compared once more, so
        that scores are true ones. What flat finds is compared once more, too, by the vectors that
        it holds, which for the cosine are of length 1 and so rounded: bit-equal images come in the
        order of exact search, such whose cosines differ by less than about 1e-7 perhaps not. By
        exact search where the index is stale, with a warning, where it finds less than k, where too
        many are equally near, or where that is quicker than to compare all that codes find. Raises
        ResfeatError where it is damaged, and UsageError as `search.nearest` does, and where faiss
        is not installed.
        """
        check_k(k)
        about, asked = self.about, np.atleast_2d(queries)
        if self.stale:
            warnings.warn(f"{self.stale}: this search is exact", stacklevel=2)
            return nearest(self._dataset, asked, k, self._layer, about.metric)
        check_vectors(self._dataset, asked, "the queries", self._layer)
        coarse = COARSE.get(about.kind)
        wanted = asked_of(about.kind, k)
        if coarse and self._is_slow(len(asked), min(wanted, about.rows)):
            return nearest(self._dataset, asked, k, self._layer, about.metric)
        scores, found = self.nearest(prepared(asked, about.metric), wanted)
        if ((found >= 0).sum(axis=1) < min(k, about.rows)).any():
            # As where the lists that it looks into hold less.
            return nearest(self._dataset, asked, k, self._layer, about.metric)
        if coarse:
            read = of_dataset(self._dataset, self._layer, self.listed, about.dim)
            return ranked(self.listed, asked, found, k, about.metric, read)
        if about.kind == "flat":
            return self._as_exact(asked, scores, found, k)
        scores, found = self.listed.ordered(scores, found, about.metric)
        names = self.listed.names(self.places_of(found.ravel()))
        return Neighbours(names.reshape(found.shape), scores)

    def _as_exact(
        self,
        queries: NDArray[np.float32],
        scores: NDArray[np.float32],
        found: NDArray[np.int64],
        k: int,
    ) -> Neighbours:
        """The k nearest by the vectors that flat holds, of more than k that FAISS found. Equal ones
        come in plan order, as from exact search."""
        metric, read = self.about.metric, of_index(self.faiss, self.listed, self.about.dim)
        best = ranked(self.listed, queries, found, k, metric, read)
        if found.shape[1] == self.about.rows:
            return best
        # Where even the last is as near as the k-th, others that were not found may be.
        doubt = np.full(len(queries), ROUNDING)
        if metric == "l2":
            lengths = np.linalg.norm(queries, axis=1)
            doubt *= (2 * lengths + np.sqrt(np.maximum(scores[:, -1], 0))) ** 2
        in_doubt = np.abs(scores[:, -1] - scores[:, k - 1]) <= doubt
        if in_doubt.any():
            doubtful, more = queries[in_doubt], min(MORE * found.shape[1], self.about.rows)
            if len(doubtful) * more <= RANKED_PAIRS:
                asked = self.nearest(prepared(doubtful, metric), more)
                sure = self._as_exact(doubtful, *asked, k)
            else:
                sure = nearest(self._dataset, doubtful, k, self._layer, metric)
            best.ids[in_doubt], best.scores[in_doubt] = sure.ids, sure.scores
        return best

    def _is_slow(self, queries: int, found: int) -> bool:
        """Whether exact search is done before so many rows a query are compared once more."""
        return ALONE * queries * found >= self.about.rows * (1 + queries / TOGETHER)

    def nearest(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and FAISS's numbers [Q, k] of the nearest to `prepared` queries; -1 for none."""
        scores, found = self.faiss.search(queries, min(k, self.about.rows))
        return scores, found

    def places_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these numbers stand in `ids`."""
        return self.listed.places_of(numbers)

    @cached_property
    def listed(self) -> Listed:
        return Listed(self.ids)

    @cached_property
    def ids(self) -> pa.Table:
        """faiss_id, id, shard, row and hash of each row."""
        path = self._folder / IDS
        self._check(path)
        try:
            return pq.read_table(path, use_threads=False).combine_chunks()
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error

    @cached_property
    def faiss(self) -> Any:
        """The index as FAISS has it, to be searched: its file is mapped, not read."""
        return self._read(faiss().IO_FLAG_MMAP)

    def to_change(self) -> Any:
        """The same in memory, to be changed."""
        return self._read(0)

    def _read(self, flags: int) -> Any:
        library, path = faiss(), self._folder / FAISS
        self._check(path)
        try:
            index = library.read_index(str(path), flags)
        except RuntimeError as error:
            raise damaged(path, error) from error
        if (index.ntotal, index.d) != (self.about.rows, self.about.dim):
            raise damaged(path, "it holds other rows")
        return index

    def check(self) -> None:
        """Raise ResfeatError where its files are not what was written."""
        for name in self.about.files:
            self._check(self._folder / name)

    def _check(self, path: Path) -> None:
        """The same of one of them, which is read for it once."""
        try:
            about = os.stat(path)
            this = about.st_ino, about.st_size, about.st_mtime_ns
            if self._checked.get(path.name) == this:
                return
            there = digest_of(path)
        except OSError as error:
            raise damaged(path, error) from error
        if there != self.about.files[path.name]:
            raise damaged(path, "it is not what was written")
        self._checked[path.name] = this

    def rows_of(self, shard: int) -> pa.Table:
        """Its rows of one part."""
        return self.ids.filter(pc.equal(self.ids["shard"], shard))

    @property
    def shards(self) -> NDArray[np.int32]:
        """The part of each row of `ids`."""
        return self.listed.shards


def digest_of(path: Path) -> str:
    """SHA-256 of a file's size and of its content, or, of one larger than `CHECKED_BYTES`, of its
    beginning and its end."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= CHECKED_BYTES:
            while piece := file.read(1 << 20):
                digest.update(piece)
        else:
            for start in (0, size - CHECKED_BYTES // 2):
                file.seek(start)
                for _ in range(CHECKED_BYTES // 2 >> 20):
                    digest.update(file.read(1 << 20))
    return digest.hexdigest()
