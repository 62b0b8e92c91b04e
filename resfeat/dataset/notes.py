"""Notes of commits: what a shard's files hold, so that nobody has to open them to know.

A note is a small JSON document in `checksums/`. `commit.py` says when it is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Self

from resfeat.dataset.layout import Layout
from resfeat.plan import Plan, Shard
from resfeat.storage import StorePath, write_json

# Notes that are read from a store at once: each is one request.
REQUESTS = 32

# SHA-256 of a shard's files by kind, `embeddings` and `failures`; None where it has no failures.
Digests = Mapping[str, str | None]


@dataclass(frozen=True)
class Note:
    """What one commit left. generation: of the plan, when the shard was done. replaces: digests of
    files that are being replaced, None once that is done; their embeddings are of generation
    `before`."""

    embedded: int
    digests: Digests
    reasons: Mapping[str, int] = field(default_factory=dict)  # failure rows by reason
    generation: int = 0
    replaces: Digests | None = None
    before: int = 0

    @property
    def failed(self) -> int:
        return sum(self.reasons.values())

    def allows(self, kind: str) -> set[str | None]:
        """The digests that a file of this kind may have."""
        return {each[kind] for each in (self.digests, self.replaces) if each}

    def generation_of(self, embeddings: str | None) -> int:
        """The generation of the embeddings that have this digest."""
        return self.generation if embeddings == self.digests["embeddings"] else self.before

    def write(self, layout: Layout, shard: int) -> None:
        write_json(layout.tmp, layout.note(shard), asdict(self))

    @classmethod
    def read(cls, layout: Layout, shard: int) -> Self | None:
        """The note of a shard; None where there is none, or none that can be understood."""
        try:
            note = cls(**json.loads(layout.note(shard).read_bytes()))
            noted = [note.digests, note.replaces or note.digests]
            is_sound = all(set(each) == {"embeddings", "failures"} for each in noted)
            return note if is_sound and note.embedded + note.failed >= 0 else None
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Commits:
    """What is committed of a dataset, by its notes."""

    done: Mapping[int, Note | None]  # by shards whose files are in place; None if a note is lost
    # Shards that hold rows and are to be done: their files were being replaced when a run ended, or
    # an update has listed them anew.
    behind: Mapping[int, Note]
    failures: frozenset[int]  # shards that have a file of failures

    @classmethod
    def of(cls, layout: Layout, plan: Plan) -> Self:
        """As the dataset stands now. Reads the notes, and no part."""
        shards = layout.committed()
        with ThreadPoolExecutor(REQUESTS if isinstance(layout.root, StorePath) else 1) as pool:
            notes = dict(zip(shards, pool.map(lambda n: Note.read(layout, n), shards), strict=True))
        behind = {
            number: note
            for number, note in notes.items()
            if note and (note.replaces or note.generation < plan.generation_of(number))
        }
        done = {shard: note for shard, note in notes.items() if shard not in behind}
        return cls(done, behind, frozenset(layout.with_failures()))

    def within(self, shards: Iterable[Shard]) -> Commits:
        """The same of these shards alone."""
        some = {shard.number for shard in shards}
        done = {number: note for number, note in self.done.items() if number in some}
        behind = {number: note for number, note in self.behind.items() if number in some}
        return Commits(done, behind, self.failures & some)

    @property
    def embedded(self) -> int:
        """Rows in `embeddings/` of finished shards."""
        return sum(note.embedded for note in self.done.values() if note)

    @property
    def reasons(self) -> Mapping[str, int]:
        """Failure rows of finished shards by reason, the commonest first."""
        counts: Counter[str] = Counter()
        for shard in self.failures:
            if note := self.done.get(shard):
                counts.update(note.reasons)
        return dict(counts.most_common())
