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

from resfeat.dataset.commit import digest
from resfeat.dataset.holding import see_alone
from resfeat.dataset.layout import Layout
from resfeat.dataset.lock import run_lock
from resfeat.dataset.notes import Note
from resfeat.dataset.reader import Dataset
from resfeat.dataset.record import Record
from resfeat.dataset.schema import FAILURES, layers_in, vector_hashes
from resfeat.errors import REASONS, ResfeatError, first_line
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
    """What `verify` found. embedded, failed: rows."""

    shards: int = 0
    unseen: int = 0  # shards that were not looked at, since their plan is damaged
    embedded: int = 0
    failed: int = 0
    duplicates: int = 0  # images embedded like one before them, to the last bit, which is no error
    problems: list[Problem] = field(default_factory=list)

    @property
    def bad_shards(self) -> list[int]:
        """Shards that are to be done again, ascending."""
        return sorted({each.shard for each in self.problems if each.shard is not None})


def verify(dataset: Dataset, on_shard: Callable[[], object] = lambda: None) -> Verification:
    """Look at every row of a dataset. `on_shard` is called after each shard of the plan.

    Raises StoreError where a store is out of reach, and ResfeatError where a folder of the dataset
    may not be looked into, or an update came meanwhile: that is no damage.
    """
    layout, shards = dataset.layout, dataset.record.plan.shards
    ids, vectors = [], []
    try:
        damaged = dict(_of_plan(dataset))
        found = Verification(len(shards), problems=[*damaged.values(), *_foreign(layout, shards)])
        once = set(layout.with_notes())
        # Where the plan itself is damaged, no part is to blame.
        planned = [shard for shard in shards.values() if shard.file not in damaged]
        found.unseen = len(shards) - len(planned)
        with ThreadPoolExecutor() as pool:
            for look in pool.map(lambda s: _look_at(dataset, s, s.number in once), planned):
                found.problems += look.problems
                found.embedded += look.embedded
                found.failed += look.failed
                ids.append(look.ids)
                vectors.append(look.vectors)
                on_shard()
    except OSError as error:
        raise ResfeatError(f"cannot look at {layout.root}: {error}; mend that") from error
    except ResfeatError:  # of a plan that cannot be read
        _check_current(dataset)
        raise
    _check_current(dataset)
    if doubled := _doubles(ids):
        message = f"{doubled} ids are there more than once"
        found.problems.append(Problem("plan", None, str(layout.plan), message))
    found.duplicates = _doubles(vectors)
    return found


def _check_current(dataset: Dataset) -> None:
    """Raise ResfeatError where an update has listed the dataset anew since it was opened."""
    now = Record.load(dataset.layout)
    if now and now.plan != dataset.record.plan:
        raise ResfeatError(f"an update changed {dataset.layout.root} meanwhile: verify it again")


def repair(
    dataset: Dataset, found: Verification, on_wait: Callable[[str], None] = lambda why: None
) -> list[int]:
    """Send the bad shards back: remove what is left of them, so that the extract command does them
    again. Returns the shards removed here; merely unfinished ones are not counted.

    on_wait: as `run_lock` has it. Raises ResfeatError while the dataset is being written, where an
    update has changed it since it was opened, and where nothing can be removed from it.
    """
    layout, shards = dataset.layout, dataset.record.plan.shards
    sent = []
    try:
        with run_lock(layout, is_run=False, on_wait=on_wait) as lock:
            see_alone(layout, on_wait, is_run=False)  # one that comes now needs this lock first
            _check_current(dataset)
            for shard in found.bad_shards:
                # Look again, now that nobody writes: what was in hand may be done by now.
                was_committed = layout.note(shard).exists()
                problems = _look_at(dataset, shards[shard], was_committed).problems
                if all(each.kind == "unfinished" for each in problems):
                    continue
                lock.check()
                # The embeddings first: without them the shard is not done, whatever else is there.
                for folder in (layout.embeddings, layout.failures):
                    remove(folder / layout.part_name(shard))
                remove(layout.note(shard))
                sent.append(shard)
    except OSError as error:
        raise ResfeatError(f"cannot repair {layout.root}: {error}") from error
    return sent


@dataclass
class _Look:
    """What one shard looks like; ids and vectors as hashes."""

    shard: int
    ids: NDArray[np.uint64]
    vectors: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    embedded: int = 0
    failed: int = 0
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, kind: Kind, path: Location, message: str) -> None:
        self.problems.append(Problem(kind, self.shard, str(path), message))


def _look_at(dataset: Dataset, shard: Shard, was_committed: bool) -> _Look:
    layout, number = dataset.layout, shard.number
    listed = [item.id for item in read_shard(layout.plan, shard)]
    hashes = b"".join(hashlib.blake2b(each.encode(), digest_size=8).digest() for each in listed)
    look = _Look(number, np.frombuffer(hashes, np.uint64))
    name = layout.part_name(number)
    part, failures = layout.embeddings / name, layout.failures / name
    note = Note.read(layout, number)
    tables = {}
    for kind, path in (("embeddings", part), ("failures", failures)):
        try:
            content = path.read_bytes()
            if not note:
                look.wrong("checksum", path, "it has no checksum")
            elif hashlib.sha256(content).hexdigest() not in note.allows(kind):
                look.wrong("checksum", path, "it was changed after its commit")
            tables[kind] = _table(dataset, kind, content)
        except FileNotFoundError:
            gone = "it was committed and is gone"
            if kind == "embeddings" and was_committed:
                look.wrong("missing", path, f"{gone}, or its run was killed right before")
            elif kind == "embeddings":
                look.wrong("unfinished", path, "not done yet")
            elif note and None not in note.allows(kind):
                look.wrong("missing", path, gone)
            if kind == "embeddings":
                return look
        except (OSError, ValueError, pa.ArrowException) as error:
            look.wrong("unreadable", path, first_line(error))
            return look
    if note and note.generation < shard.generation:
        look.wrong("unfinished", part, "an update listed it anew, and it is not done yet")
        return look
    if note and note.replaces:
        look.wrong("unfinished", part, "a run ended while it replaced this shard")
        return look
    rows = [each for table in tables.values() for each in table["id"].to_pylist()]
    if sorted(rows) != sorted(listed):
        count = len(set(rows) ^ set(listed)) + len(rows) - len(set(rows))
        look.wrong("rows", part, f"{count} of its images are not exactly one row")
    table = tables["embeddings"]
    if _fingerprint(table) != dataset.record.identity.fingerprint:
        look.wrong("identity", part, "its fingerprint is another one, or none")
    layers = layers_in(table, dataset.record.identity.columns.values())
    for message in _bad_values(table["id"], layers):
        look.wrong("values", part, message)
    reasons = tables["failures"]["reason"].to_pylist() if "failures" in tables else []
    if unknown := set(reasons) - set(REASONS):
        look.wrong("rows", failures, f"unknown reasons: {', '.join(sorted(unknown))}")
    counted = (len(table), Counter(reasons))
    if note and not look.problems and (note.embedded, note.reasons) != counted:
        look.wrong("checksum", layout.note(number), "it counts other rows than there are")
    look.embedded, look.failed = len(table), len(reasons)
    look.vectors = vector_hashes(np.hstack(layers))
    return look


def _of_plan(dataset: Dataset) -> Iterator[tuple[str, Problem]]:
    """Files of the plan that are not what was listed, by name."""
    for file in dataset.record.plan.files:
        path = dataset.layout.plan / file.name
        if (there := digest(path)) != file.sha256:
            message = "it was changed since" if there else "it is gone"
            yield file.name, Problem("plan", None, str(path), message)


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


def _bad_values(ids: pa.ChunkedArray, layers: Sequence[NDArray[np.floating]]) -> Iterator[str]:
    """What is wrong with vectors: of each image, all its layers [rows, D]."""
    finite, same = np.ones(len(ids), bool), np.zeros(len(ids), bool)
    for vectors in layers:
        finite &= np.isfinite(vectors).all(axis=1)
        first = vectors[:, :1] if vectors.shape[1] > 1 else 0
        same |= (vectors == first).all(axis=1)
    for wrong, what in ((~finite, "not finite"), (same & finite, "zero or constant")):
        if count := int(wrong.sum()):
            example = ids[int(wrong.argmax())].as_py()
            yield f"{count} vectors are {what}, the first that of {example}"


def _foreign(layout: Layout, shards: Iterable[int]) -> Iterator[Problem]:
    """Files and folders that a reader of the folders would take for rows, or stumble over."""
    known = {layout.part_name(shard) for shard in shards}
    for folder in (layout.embeddings, layout.failures):
        every: Iterable[Location] = folder.iterdir() if folder.exists() else ()
        for path in sorted(every, key=str):
            # Readers of a folder pass over what begins with these, whatever else it is.
            hidden = path.name.startswith((".", "_")) and not path.name.endswith(".parquet")
            if path.name not in known and not hidden:
                message = "not a part of this dataset: move it elsewhere"
                yield Problem("foreign", None, str(path), message)


def _fingerprint(table: pa.Table) -> object:
    """Of the identity that a part says that it has; None where it says nothing of the kind."""
    try:
        return json.loads(table.schema.metadata[b"resfeat"])["fingerprint"]
    except (KeyError, TypeError, ValueError):
        return None


def _doubles(hashes: Sequence[NDArray[np.uint64]]) -> int:
    """How many have been there before."""
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    return len(every) - len(np.unique(every))
