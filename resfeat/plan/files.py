"""Cutting the listing into shards while it is written, and reading one shard back.

A plan is a folder of Parquet files in which each row group is one shard, so a worker reads its own
rows and nothing else. Both sides are streamed: memory does not grow with the number of items.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from resfeat.errors import ResfeatError, first_line
from resfeat.plan.plan import Plan, PlanFile, Shard
from resfeat.sources import Item, carried_in, items_of, schema_of, stays_whole
from resfeat.storage import Drafts, Location, draft, open_parquet, sha256

SHARD_SIZE = 4096
SHARDS_PER_FILE = 64

# Columns that mostly say the same: a dictionary of ids takes long, and twice the space.
REPEATED = ["etag", "column", "label", "problem"]

# A small collection is cut finer, so that all workers have work and a crash costs little.
SMALL_SHARDS = 32
SMALLEST_SHARD = 128


def shard_size_for(items: int) -> int:
    """The default shard size: 4,096, or the multiple of 128 that gives about 32 shards."""
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
    schema, tables = schema_of(carried), iter(listing)
    if shard_size is None:
        held, rows_held = list[pa.Table](), 0
        while rows_held < SMALL_SHARDS * SHARD_SIZE and (table := next(tables, None)):
            held.append(table)
            rows_held += table.num_rows
        shard_size = shard_size_for(rows_held)
        tables = itertools.chain(held, tables)
    cut = _recut(tables, shard_size)
    files: list[PlanFile] = []
    for first in cut:  # of each file
        name = f"plan-{len(files):05d}.parquet"
        file, rows = draft(drafts, name), []
        with pq.ParquetWriter(
            file.sink, schema, compression="zstd", use_dictionary=REPEATED
        ) as writer:
            for table in itertools.chain([first], itertools.islice(cut, SHARDS_PER_FILE - 1)):
                writer.write_table(table, row_group_size=table.num_rows)
                rows.append(table.num_rows)
        start = len(files) * SHARDS_PER_FILE
        shards = tuple(range(start, start + len(rows)))
        files.append(PlanFile(name, 0, sha256(file), shards, tuple(rows)))
        file.publish(folder / name)
    return Plan(shard_size, tuple(files))


def read_shard(folder: Location, shard: Shard) -> list[Item]:
    """The items of one shard, in plan order. Raises ResfeatError where the plan cannot be read."""
    path = folder / shard.file
    try:
        with open_parquet(path) as file:
            table = file.read_row_group(shard.row_group, use_threads=False)
        if table.num_rows != shard.rows:
            raise pa.ArrowInvalid("its rows are not those that were listed")
        return items_of(table)
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's own are of these
        raise ResfeatError(
            f"{path}, the listing of shard {shard.number}, cannot be read ({first_line(error)}): "
            "bring it back, or give a new -o"
        ) from error


def carried_columns(folder: Location, plan: Plan) -> tuple[pa.Field, ...]:
    """The columns that travel with the items, as the first file of the plan has them."""
    with open_parquet(folder / plan.files[0].name) as file:
        return carried_in(file.schema_arrow)


def lies_far(folder: Location, plan: Plan) -> bool:
    """Whether any image that the first file of the plan lists is in a store or on the web: by the
    least and the greatest of each shard's addresses."""
    with open_parquet(folder / plan.files[0].name) as file:
        about, place = file.metadata, file.schema_arrow.get_field_index("uri")
        groups = map(about.row_group, range(about.num_row_groups))
        bounds = (group.column(place).statistics for group in groups)
        return any(
            not uri.startswith("file://")
            for each in bounds
            if each and each.has_min_max
            for uri in (each.min, each.max)
        )


def _recut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
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
