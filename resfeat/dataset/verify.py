"""Is every row there, once, as it was committed? And sending back what is not.

Each shard is held against the plan and against the digests that were noted at its commit, and every
vector is looked at. Memory grows by 16 bytes an image: to find doubles, ids and vectors are
remembered by 64-bit hashes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.dataset.layout import Layout
from resfeat.dataset.lock import run_lock
from resfeat.dataset.notes import Note
from resfeat.dataset.reader import Dataset
from resfeat.dataset.schema import FAILURES
from resfeat.errors import REASONS, ResfeatError, StoreError, first_line
from resfeat.plan import Shard, read_shard
from resfeat.storage import Location, open_parquet, remove

Kind = Literal[
    "plan", "unfinished", "missing", "unreadable", "checksum", "rows", "identity", "values",
    "foreign",
]  # fmt: skip

CHECKS: dict[Kind, str] = {
    "plan": "the plan can be read, its ids are unique",
    "unfinished": "every shard of the plan is done",
    "missing": "nothing that was committed is gone",
    "unreadable": "every part can be read",
    "checksum": "every part is what was committed",
    "rows": "every image of the plan is one row",
    "identity": "every part is of this dataset's identity",
    "values": "every vector is finite, and neither zero nor constant",
    "foreign": "nothing else lies among the parts",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong: with which shard, if it is one shard, and in which file."""

    kind: Kind
    shard: int | None
    path: str
    message: str


@dataclass
class Verification:
    """What `verify` found.

    embedded, failed: rows. duplicates: images with the same embedding, bit for bit, as one before
    them, which is no error. unseen: shards that were not looked at, since their plan is damaged.
    """

    shards: int = 0
    unseen: int = 0
    embedded: int = 0
    failed: int = 0
    duplicates: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def bad_shards(self) -> list[int]:
        """Shards that are to be done again, ascending."""
        return sorted({each.shard for each in self.problems if each.shard is not None})


def verify(dataset: Dataset, on_shard: Callable[[], object] = lambda: None) -> Verification:
    """Look at every row of a dataset. `on_shard` is called after each shard of the plan.

    Raises StoreError where a store is out of reach, and ResfeatError where a folder of the dataset
    may not be looked into: that is no damage.
    """
    try:
        return _verify(dataset, on_shard)
    except OSError as error:
        raise ResfeatError(f"cannot look at {dataset.layout.root}: {error}; mend that") from error


def _verify(dataset: Dataset, on_shard: Callable[[], object]) -> Verification:
    shards = dataset.record.plan.shards
    found = Verification(shards=len(shards))
    damaged = dict(_of_plan(dataset))
    found.problems += damaged.values()
    found.problems += _foreign(dataset.layout, shards)
    ids, vectors = [], []
    once = set(dataset.layout.with_checksums())
    # Where the plan itself is damaged, no part is to blame.
    planned = [shard for shard in shards.values() if shard.file not in damaged]
    found.unseen = found.shards - len(planned)
    with ThreadPoolExecutor() as pool:
        for looked in pool.map(
            lambda shard: _look_at(dataset, shard, shard.number in once), planned
        ):
            found.problems += looked.problems
            found.embedded += looked.embedded
            found.failed += looked.failed
            ids.append(looked.ids)
            vectors.append(looked.vectors)
            on_shard()
    if doubled := _doubles(ids):
        message = f"{doubled} ids are there more than once"
        found.problems.append(Problem("plan", None, str(dataset.layout.plan), message))
    found.duplicates = _doubles(vectors)
    found.problems = list(dict.fromkeys(found.problems))  # shards share the files of the plan
    return found


def repair(
    dataset: Dataset, found: Verification, on_wait: Callable[[str], None] = lambda why: None
) -> list[int]:
    """Send the bad shards back: remove what is left of them, so that the extract command does them
    again. Returns the shards removed here; merely unfinished ones are not counted.

    on_wait: as `run_lock` has it. Raises ResfeatError while the dataset is being written, and where
    nothing can be removed from it.
    """
    layout, shards = dataset.layout, dataset.record.plan.shards
    sent = []
    try:
        with run_lock(layout, is_run=False, on_wait=on_wait):
            for shard in found.bad_shards:
                # Look again, now that nobody writes: what was in hand may be done by now.
                was_committed = layout.checksum(shard).exists()
                problems = _look_at(dataset, shards[shard], was_committed).problems
                if all(each.kind == "unfinished" for each in problems):
                    continue
                # The embeddings first: without them the shard is not done, whatever else is there.
                for folder in (layout.embeddings, layout.failures):
                    remove(folder / layout.part_name(shard))
                remove(layout.checksum(shard))
                sent.append(shard)
    except OSError as error:
        raise ResfeatError(f"cannot repair {layout.root}: {error}") from error
    return sent


@dataclass
class _Look:
    """What one shard looks like; ids and vectors as hashes, uint64."""

    embedded: int = 0
    failed: int = 0
    ids: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    vectors: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    problems: list[Problem] = field(default_factory=list)


def _look_at(dataset: Dataset, planned: Shard, was_committed: bool) -> _Look:
    layout, shard = dataset.layout, planned.number
    name = layout.part_name(shard)
    part, failures = layout.embeddings / name, layout.failures / name
    look = _Look()

    def wrong(kind: Kind, path: Location, message: str) -> None:
        look.problems.append(Problem(kind, shard, str(path), message))

    try:
        listed = [item.id for item in read_shard(layout.plan, planned)]
    except StoreError:
        raise
    except ResfeatError as error:
        path = layout.plan / planned.file
        look.problems.append(Problem("plan", None, str(path), first_line(error)))
        return look
    look.ids = np.array([_hash(each) for each in listed], np.uint64)

    note = Note.read(layout, shard)
    tables = {}
    for kind, path in (("embeddings", part), ("failures", failures)):
        try:
            content = path.read_bytes()
            if not note:
                wrong("checksum", path, "it has no checksum")
            elif hashlib.sha256(content).hexdigest() not in note.allows(kind):
                wrong("checksum", path, "it was changed after its commit")
            tables[kind] = _table(dataset, kind, content)
        except FileNotFoundError:
            if kind == "embeddings":
                look.problems.append(_absent(shard, part, was_committed))
                return look
            if note and None not in note.allows(kind):
                wrong("missing", path, "it was committed and is gone")
        except (OSError, ValueError, pa.ArrowException) as error:
            wrong("unreadable", path, first_line(error))
            return look
    if note and note.replaces:
        wrong("unfinished", part, "a run ended while it replaced this shard")
        return look
    rows = [each for table in tables.values() for each in table["id"].to_pylist()]
    if sorted(rows) != sorted(listed):
        count = len(set(rows) ^ set(listed)) + len(rows) - len(set(rows))
        wrong("rows", part, f"{count} of its images are not exactly one row")
    for problem, folder, message in _amiss(dataset, tables):
        wrong(problem, layout.root / folder / name, message)
    reasons = tables["failures"]["reason"].to_pylist() if "failures" in tables else []
    counted = (len(tables["embeddings"]), Counter(reasons))
    if note and not look.problems and (note.embedded, note.reasons) != counted:
        wrong("checksum", layout.checksum(shard), "it counts other rows than there are")
    look.embedded = len(tables["embeddings"])
    look.failed = len(rows) - look.embedded
    look.vectors = _hashes(np.hstack([*_layers(dataset, tables["embeddings"])]))
    return look


def _of_plan(dataset: Dataset) -> Iterator[tuple[str, Problem]]:
    """Files of the plan that are not what was listed, by name."""
    for file in dataset.record.plan.files:
        path = dataset.layout.plan / file.name
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
                yield file.name, Problem("plan", None, str(path), "it was changed since")
        except FileNotFoundError:
            yield file.name, Problem("plan", None, str(path), "it is gone")


def _absent(shard: int, part: Location, was_committed: bool) -> Problem:
    """What is wrong with a shard that has no embeddings in place."""
    if was_committed:
        message = "it was committed and is gone, or its run was killed right before"
        return Problem("missing", shard, str(part), message)
    return Problem("unfinished", shard, str(part), "not done yet")


def _table(dataset: Dataset, kind: str, content: bytes) -> pa.Table:
    """A part whose columns can be looked at. Raises OSError or ArrowException for any other."""
    with open_parquet(content) as file:
        table = file.read(use_threads=False)
    table.validate(full=True)
    identity = dataset.record.identity
    wanted = FAILURES.names if kind == "failures" else ["id", *identity.columns.values()]
    for name in wanted:
        if name not in table.schema.names:
            raise pa.ArrowInvalid(f"it has no column {name}")
        column, vectors = table[name], name in identity.columns.values()
        if vectors and pa.types.is_fixed_size_list(column.type):
            right = column.type.value_type == pa.type_for_alias(identity.dtype)
        else:
            right = not vectors and column.type == pa.string()
        if not right:
            raise pa.ArrowInvalid(f"its column {name} is of another type, {column.type}")
        if column.null_count or (vectors and column.combine_chunks().flatten().null_count):
            raise pa.ArrowInvalid(f"its column {name} has nulls")
    return table


def _amiss(dataset: Dataset, tables: dict[str, pa.Table]) -> Iterator[tuple[Kind, str, str]]:
    """What is wrong with the content of a shard's tables: kind, folder, message."""
    table = tables["embeddings"]
    if _fingerprint(table) != dataset.record.identity.fingerprint:
        yield "identity", "embeddings", "its fingerprint is another one, or none"
    finite, same = np.ones(len(table), bool), np.zeros(len(table), bool)
    for vectors in _layers(dataset, table):
        finite &= np.isfinite(vectors).all(axis=1)
        first = vectors[:, :1] if vectors.shape[1] > 1 else 0
        same |= (vectors == first).all(axis=1)
    for wrong, what in ((~finite, "not finite"), (same & finite, "zero or constant")):
        if count := int(wrong.sum()):
            example = table["id"][int(wrong.argmax())].as_py()
            yield "values", "embeddings", f"{count} vectors are {what}, the first that of {example}"
    if failures := tables.get("failures"):
        unknown = set(failures["reason"].to_pylist()) - set(REASONS)
        if unknown:
            yield "rows", "failures", f"unknown reasons: {', '.join(sorted(unknown))}"


def _foreign(layout: Layout, shards: Iterable[int]) -> Iterator[Problem]:
    """Files and folders that a reader of the folders would take for rows, or stumble over."""
    known = {layout.part_name(shard) for shard in shards}
    for folder in (layout.embeddings, layout.failures):
        for path in sorted(_entries(folder), key=str):
            # Readers of a folder pass over what begins with these, whatever else it is.
            hidden = path.name.startswith((".", "_")) and not path.name.endswith(".parquet")
            if path.name not in known and not hidden:
                message = "not a part of this dataset: move it elsewhere"
                yield Problem("foreign", None, str(path), message)


def _entries(folder: Location) -> Sequence[Location]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _fingerprint(table: pa.Table) -> object:
    """Of the identity that a part says that it has; None where it says nothing of the kind."""
    try:
        return json.loads((table.schema.metadata or {})[b"resfeat"])["fingerprint"]
    except (KeyError, TypeError, ValueError):
        return None


def _layers(dataset: Dataset, table: pa.Table) -> Iterator[NDArray[np.floating]]:
    """The embeddings of each layer, [rows, D]."""
    for column in dataset.record.identity.columns.values():
        values = table[column].combine_chunks().flatten().to_numpy()
        yield values.reshape(len(table), table.schema.field(column).type.list_size)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _hashes(vectors: NDArray[np.floating]) -> NDArray[np.uint64]:
    """Of each row's bits: a sum with fixed odd random factors, modulo 2^64."""
    bits = vectors.view(np.uint32 if vectors.itemsize == 4 else np.uint16).astype(np.uint64)
    factors = np.random.default_rng(0).integers(2**63, size=bits.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):
        return bits @ (2 * factors + 1)


def _doubles(hashes: Sequence[NDArray[np.uint64]]) -> int:
    """How many have been there before."""
    every = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    return len(every) - len(np.unique(every))
