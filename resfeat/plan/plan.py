"""`Plan`: which shard is listed in which row group of which file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self


@dataclass(frozen=True, order=True)
class Shard:
    """Where the items of one shard are listed: `rows` of them, in one row group of a file.
    generation: the last one that listed it anew."""

    number: int
    file: str
    row_group: int
    rows: int
    generation: int = 0

    def __str__(self) -> str:
        return str(self.number)


@dataclass(frozen=True)
class PlanFile:
    """A file of the plan. shards, rows: the shard in each row group, and its number of items."""

    name: str
    generation: int
    sha256: str
    shards: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The files of the listing. shard_size: items in a shard; the last one may hold fewer."""

    shard_size: int
    files: tuple[PlanFile, ...]

    @cached_property
    def shards(self) -> Mapping[int, Shard]:
        """Every shard by its number, ascending. A later generation replaces an earlier one."""
        found = {
            number: Shard(number, file.name, row_group, rows, file.generation)
            for file in sorted(self.files, key=lambda file: file.generation)
            for row_group, (number, rows) in enumerate(zip(file.shards, file.rows, strict=True))
        }
        return dict(sorted(found.items()))

    @cached_property
    def items(self) -> int:
        return sum(shard.rows for shard in self.shards.values())

    @property
    def generation(self) -> int:
        """0, and one more for each update that found something to do."""
        return max((file.generation for file in self.files), default=0)

    def generation_of(self, shard: int) -> int:
        """The last generation that listed this shard anew; 0 for one that is not ours."""
        return self.shards[shard].generation if shard in self.shards else 0

    def followed_by(self, files: Iterable[PlanFile]) -> Self:
        """The plan of the next generation, which has these files beside those of ours that still
        list a shard."""
        every = replace(self, files=(*self.files, *files))
        current = {shard.file for shard in every.shards.values()}
        return replace(self, files=tuple(file for file in every.files if file.name in current))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, from JSON, where tuples are lists."""
        files = [
            PlanFile(**file | {name: tuple(file[name]) for name in ("shards", "rows")})
            for file in plain["files"]
        ]
        return cls(plain["shard_size"], tuple(files))
