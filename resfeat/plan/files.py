"""Cutting the listing into shards while it is written, and reading one shard back.

A plan is a folder of Parquet files in which each row group is one shard, so a worker reads its own
rows and nothing else. Both sides are streamed: memory does not grow with the number of items.

Behind the columns of a listing each row has two more: `since`, the generation of the plan that
listed it first as it is now, and `change`, what it was then: "added", "changed" or "removed". A row
that was removed is no item any more. It stays, since its id belongs to that shard for ever.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from resfeat.errors import ResfeatError, first_line
from resfeat.plan.plan import Plan, PlanFile, Shard
from resfeat.sources import Item, carried_in, items_of, schema_of, stays_whole
from resfeat.storage import Drafts, Location, draft, open_parquet, sha256

SHARD_SIZE = 4096
SHARDS_PER_FILE = 64

# Files of a plan that are looked at to see where images lie: all, up to 16 million of them. In a
# store each takes some requests, so that some are read at a time.
FILES_SEEN = 64
READERS = 8

# Columns that mostly say the same: a dictionary of ids takes long, and twice the space.
REPEATED = ["etag", "column", "label", "problem", "since", "change"]
OURS = (pa.field("since", pa.int32(), nullable=False), pa.field("change", pa.string()))

# A small collection is cut finer, so that eight workers end at about the same time, and a crash
# costs little.
SMALL_SHARDS = 64
SMALLEST_SHARD = 128


def shard_size_for(items: int) -> int:
    """The default shard size: 4,096, or the multiple of 128 that gives about 64 shards."""
    wanted = -(-items // SMALL_SHARDS)
    return min(SHARD_SIZE, max(SMALLEST_SHARD, -(-wanted // SMALLEST_SHARD) * SMALLEST_SHARD))


def write_plan(
    folder: Location,
    drafts: Drafts,
    listing: Iterable[pa.Table],
    shard_size: int | None,
    carried: Sequence[pa.Field] = (),
) -> Plan:
    """Write the tables of a listing into `folder` as they come, cut into shards, by way of drafts.

    carried: the columns of `Item.carried`. Where no shard size is given, as many rows as the
    largest default needs are held back until it is clear how long the listing is.
    """
    tables = iter(listing)
    if shard_size is None:
        held, rows_held = list[pa.Table](), 0
        while rows_held < SMALL_SHARDS * SHARD_SIZE and (table := next(tables, None)):
            held.append(table)
            rows_held += table.num_rows
        shard_size = shard_size_for(rows_held)
        tables = itertools.chain(held, tables)
    shards = enumerate(marked(table, 0) for table in recut(tables, shard_size))
    return Plan(shard_size, tuple(write_files(folder, drafts, plan_schema(carried), shards)))


def write_files(
    folder: Location,
    drafts: Drafts,
    schema: pa.Schema,
    shards: Iterable[tuple[int, pa.Table]],
    generation: int = 0,
) -> Iterator[PlanFile]:
    """Write shards by their numbers, each with all its rows, into files of one generation."""
    shards, prefix = iter(shards), f"plan-{generation}-" if generation else "plan-"
    for count, first in enumerate(shards):  # of each file
        name = f"{prefix}{count:05d}.parquet"
        file, numbers, rows = draft(drafts, name), list[int](), list[int]()
        with pq.ParquetWriter(
            file.sink, schema, compression="zstd", use_dictionary=REPEATED
        ) as writer:
            for number, table in itertools.chain(
                [first], itertools.islice(shards, SHARDS_PER_FILE - 1)
            ):
                writer.write_table(table, row_group_size=table.num_rows)
                numbers.append(number)
                rows.append(pc.sum(is_listed(table)).as_py())
        yield PlanFile(name, generation, sha256(file), tuple(numbers), tuple(rows))
        file.publish(folder / name)


def plan_schema(carried: Sequence[pa.Field]) -> pa.Schema:
    """The columns of a plan. carried: those of `Item.carried`."""
    return pa.schema([*schema_of(carried), *OURS])


def marked(table: pa.Table, generation: int, change: str = "added") -> pa.Table:
    """Rows of a listing as a plan has them."""
    since = pa.array(np.full(table.num_rows, generation, np.int32))
    changes = pa.repeat(pa.scalar(change), table.num_rows)
    return table.append_column(OURS[0], since).append_column(OURS[1], changes)


def is_listed(table: pa.Table) -> pa.ChunkedArray:
    """Which rows of a plan are items."""
    return pc.not_equal(table["change"], "removed")


def read_shard(folder: Location, shard: Shard) -> list[Item]:
    """The items of one shard, in plan order. Raises ResfeatError where the plan cannot be read."""
    table = read_rows(folder, shard)
    return items_of(table.filter(is_listed(table)))


def read_rows(folder: Location, shard: Shard) -> pa.Table:
    """All rows of one shard, those that were removed among them. Raises as `read_shard`."""
    with _opened(folder / shard.file, f"the listing of shard {shard.number}") as file:
        table = file.read_row_group(shard.row_group, use_threads=False)
        if pc.sum(is_listed(table)).as_py() != shard.rows:
            raise pa.ArrowInvalid("its rows are not those that were listed")
        return table


@contextmanager
def _opened(path: Location, what: str = "a part of the listing") -> Iterator[pq.ParquetFile]:
    try:
        with open_parquet(path) as file:
            yield file
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's own are of these
        raise ResfeatError(
            f"{path}, {what}, cannot be read ({first_line(error)}): bring it back, or give a new -o"
        ) from error


def changed_since(folder: Location, plan: Plan, generation: int) -> pa.Table:
    """The items that a later generation than this added, changed or removed, `id` and `change`.
    Raises as `read_shard`."""
    found = [pa.table({"id": pa.array([], pa.string()), "change": pa.array([], pa.string())})]
    for shard in plan.shards.values():
        if shard.generation > generation:
            rows = read_rows(folder, shard)
            later = rows.filter(pc.greater(rows["since"], generation))
            found.append(pa.table({name: later[name] for name in found[0].column_names}))
    return pa.concat_tables(found)


def carried_columns(folder: Location, plan: Plan) -> tuple[pa.Field, ...]:
    """The columns that travel with the items, as the first file of the plan has them. Raises as
    `read_shard`."""
    with _opened(folder / plan.files[0].name) as file:
        return carried_in(file.schema_arrow)


def addresses(folder: Location, plan: Plan) -> list[str]:
    """The least and the greatest address of each shard; of a long listing those of some shards, all
    along it. Raises as `read_shard`."""
    some = plan.files[:: -(-len(plan.files) // FILES_SEEN)]
    with ThreadPoolExecutor(READERS, "plan") as readers:
        bounds = readers.map(_bounds, [folder / file.name for file in some])
        return list(itertools.chain.from_iterable(bounds))


def _bounds(path: Location) -> list[str]:
    """The least and the greatest address of each shard in a file of a plan, by its footer."""
    with _opened(path) as file:
        about, place = file.metadata, file.schema_arrow.get_field_index("uri")
        groups = map(about.row_group, range(about.num_row_groups))
        bounds = (group.column(place).statistics for group in groups)
        return [uri for each in bounds if each and each.has_min_max for uri in (each.min, each.max)]


def recut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` each, the last one shorter. A table that is to stay whole
    does so, whatever its length, and ends what came before it."""
    held = None
    for table in tables:
        if stays_whole(table):
            yield from [held, table] if held else [table]
            held = None
            continue
        held = pa.concat_tables([held, table]) if held else table
        while len(held) >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held:
        yield held
