"""What a new listing changes: held against the plan, and written as its next generation.

An id belongs to one shard for ever. New ones come in new shards; an item that changed, went or came
back stays where it was, and its shard is listed anew, whole. Memory grows by 26 bytes an item, and
by the rows of those that are new or changed: ids and versions are compared by hashes of 64 bits.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from resfeat.errors import ResfeatError
from resfeat.plan.files import (
    carried_columns,
    is_listed,
    marked,
    plan_schema,
    read_rows,
    recut,
    write_files,
)
from resfeat.plan.plan import Plan, Shard
from resfeat.sources import CARRIED
from resfeat.storage import Drafts, Location

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]
# An odd number that spreads what is multiplied by it (2^64 divided by the golden ratio).
SPREAD = np.uint64(0x9E3779B97F4A7C15)
# The hash of a null, which is neither 0 nor "".
NULL = np.uint64(0x6A09E667F3BCC909)
SAME_HASH = (
    "two ids have the same hash, which happens once in a great many updates, and hardly twice: "
    "give the same command again"
)


@dataclass(frozen=True)
class Changes:
    """How many items are new, are not what they were, are gone, and are as they were."""

    added: int
    changed: int
    removed: int
    kept: int

    def __bool__(self) -> bool:
        return self.added + self.changed + self.removed > 0


class _Known:
    """The rows of a plan, by their places in it. starts: the place of each shard's first row."""

    def __init__(self, folder: Location, plan: Plan) -> None:
        ids, versions, listed = list[Hashes](), list[Hashes](), list[NDArray[np.bool_]]()
        self.starts = [0]
        for shard in plan.shards.values():
            table = read_rows(folder, shard)
            ids.append(hashes(table["id"]))
            versions.append(versions_of(table))
            listed.append(is_listed(table).to_numpy())
            self.starts.append(self.starts[-1] + table.num_rows)
        every, self.versions = _joined(ids, np.uint64), _joined(versions, np.uint64)
        self.is_listed = _joined(listed, np.bool_)
        self._order = np.argsort(every, kind="stable")
        self._sorted = every[self._order]
        if np.any(self._sorted[1:] == self._sorted[:-1]):
            raise ResfeatError(SAME_HASH)  # one of them would pass for gone

    def places(self, ids: Hashes) -> Places:
        """Where these ids are listed, -1 for those that are not."""
        if not len(self._order):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self._sorted, ids), len(self._order) - 1)
        return np.where(self._sorted[at] == ids, self._order[at], -1)


class Difference:
    """What a listing has otherwise than the plan. listing: its tables, all of which are read."""

    def __init__(self, folder: Location, plan: Plan, listing: Iterable[pa.Table]) -> None:
        self._folder, self._plan = folder, plan
        self._known = known = _Known(folder, plan)
        self._new: list[pa.Table] = []
        others, places = list[pa.Table](), list[Places]()
        is_there = np.zeros(len(known.versions), bool)
        for table in listing:
            at = known.places(hashes(table["id"]))
            is_known = at >= 0
            is_there[at[is_known]] = True
            as_it_was = is_known.copy()
            as_it_was[is_known] = known.is_listed[at[is_known]]
            as_it_was[as_it_was] = known.versions[at[as_it_was]] == versions_of(
                table.filter(pa.array(as_it_was))
            )
            if not is_known.all():
                self._new.append(table.filter(pa.array(~is_known)))
            if (is_other := is_known & ~as_it_was).any():
                others.append(table.filter(pa.array(is_other)))
                places.append(at[is_other])
        every = _joined(places, np.int64)
        order = np.argsort(every, kind="stable")
        self._places = every[order]  # of items that changed or came back, ascending
        self._others = pa.concat_tables(others).take(order) if others else None
        self._removed = np.flatnonzero(known.is_listed & ~is_there)  # places

    @cached_property
    def changes(self) -> Changes:
        returned = int((~self._known.is_listed[self._places]).sum())
        changed, removed = len(self._places) - returned, len(self._removed)
        new = sum(table.num_rows for table in self._new)
        return Changes(new + returned, changed, removed, self._plan.items - changed - removed)

    @cached_property
    def touched(self) -> list[Shard]:
        """Shards that are to be listed anew; new ones come beside them."""
        shards = list(self._plan.shards.values())
        places = np.concatenate([self._places, self._removed])
        at = np.searchsorted(self._known.starts, places, side="right") - 1
        return [shards[n] for n in np.unique(at)]

    @property
    def new_shards(self) -> int:
        """How many shards would be added."""
        return sum(1 for _ in recut(self._new, self._plan.shard_size))

    def write(self, drafts: Drafts) -> Plan:
        """Write the next generation into the plan's folder. It counts once a record names it."""
        schema = plan_schema(carried_columns(self._folder, self._plan))
        generation = self._plan.generation + 1
        files = write_files(self._folder, drafts, schema, self._shards(generation), generation)
        return self._plan.followed_by(list(files))

    def _shards(self, generation: int) -> Iterator[tuple[int, pa.Table]]:
        plan, starts = self._plan, dict(zip(self._plan.shards, self._known.starts, strict=False))
        for shard in self.touched:
            yield shard.number, self._listed_anew(shard, starts[shard.number], generation)
        new = (marked(table, generation) for table in recut(self._new, plan.shard_size))
        yield from enumerate(new, max(plan.shards) + 1)

    def _listed_anew(self, shard: Shard, start: int, generation: int) -> pa.Table:
        """All rows of a shard, which begins at this place, as they are now."""
        rows = read_rows(self._folder, shard)
        end = start + rows.num_rows
        first, last = np.searchsorted(self._places, [start, end])
        at = self._places[first:last] - start
        if self._others and len(at):
            now = self._others.slice(first, last - first)
            if rows["id"].take(at).to_pylist() != now["id"].to_pylist():
                raise ResfeatError(SAME_HASH)
            returned = ~self._known.is_listed[self._places[first:last]]
            now = marked(now, generation)
            change = pc.if_else(pa.array(returned), "added", "changed")
            now = now.set_column(now.schema.get_field_index("change"), "change", change)
            take = np.arange(rows.num_rows)
            take[at] = rows.num_rows + np.arange(len(at))
            rows = pa.concat_tables([rows, now.cast(rows.schema)]).take(take)
        gone = np.zeros(rows.num_rows, bool)
        first, last = np.searchsorted(self._removed, [start, end])
        gone[self._removed[first:last] - start] = True
        for name, value in (("since", pa.scalar(generation, pa.int32())), ("change", "removed")):
            column = pc.if_else(pa.array(gone), value, rows[name])
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), column)
        # Whoever reads a file of several images reads them in the order in which they lie now.
        if rows["offset"].null_count < rows.num_rows:
            rows = rows.sort_by([("uri", "ascending"), ("offset", "ascending")])
        return rows


def hashes(column: pa.ChunkedArray) -> Hashes:
    """Of each value: numbers as they are, Python's own hash of others, `NULL` for nulls."""
    kind, nulls = column.type, column.null_count
    if nulls == len(column):
        return np.full(len(column), NULL)
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.int64())
    if pa.types.is_integer(column.type):
        given = pc.fill_null(column, 0).cast(pa.int64(), safe=False).to_numpy().view(np.uint64)
    else:
        values: Iterable[object] = column.to_pylist()
        if not pa.types.is_string(kind):
            values = map(repr, values)  # lists have no hash, and NaN has another one each time
        given = np.fromiter(map(hash, values), np.int64, len(column)).view(np.uint64)
    return np.where(column.is_valid().to_numpy(), given, NULL) if nulls else given


def versions_of(table: pa.Table) -> Hashes:
    """A hash of what each item is: its size and etag, or mtime where it has none, where its bytes
    are, and what it takes along."""
    when = pc.if_else(
        table["etag"].is_valid(), pa.scalar(None, table["mtime"].type), table["mtime"]
    )
    names = ["size", "etag", "uri", "offset", "column", "label", "problem"]
    carried = [name for name in table.column_names if name.startswith(CARRIED)]
    total = np.zeros(table.num_rows, np.uint64)
    with np.errstate(over="ignore"):
        for column in (when, *(table[name] for name in (*names, *carried))):
            total = (total ^ hashes(column)) * SPREAD
            total ^= total >> np.uint64(29)
    return total


def _joined(arrays: Sequence[NDArray[Any]], kind: type) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, kind)
