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
from resfeat.sources import Item
from resfeat.storage import Drafts, Location, draft, open_parquet, sha256

SHARD_SIZE = 4096
SHARDS_PER_FILE = 64

# A small collection is cut finer, so that all workers have work and a crash costs little.
SMALL_SHARDS = 32
SMALLEST_SHARD = 128

# The fields of `Item`, in its order; the columns that are carried follow.
OWN = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("size", pa.int64(), nullable=False),
    pa.field("mtime", pa.timestamp("us", tz="UTC"), nullable=False),
    pa.field("offset", pa.int64()),
    pa.field("label", pa.string()),
)


def shard_size_for(items: int) -> int:
    """The default shard size: 4,096, or the multiple of 128 that gives about 32 shards."""
    wanted = -(-items // SMALL_SHARDS)
    return min(SHARD_SIZE, max(SMALLEST_SHARD, -(-wanted // SMALLEST_SHARD) * SMALLEST_SHARD))


def write_plan(
    folder: Location,
    drafts: Drafts,
    listing: Iterable[Item],
    shard_size: int | None,
    carried: Sequence[pa.Field] = (),
) -> Plan:
    """Write the listing into `folder` as it comes, cut into shards, by way of drafts.

    carried: the columns of `Item.carried`. Where no shard size is given, as many rows as the
    largest default needs are held back until it is clear how long the listing is.
    """
    schema = pa.schema([*OWN, *carried])
    tables = _tables(listing, schema, shard_size or SMALLEST_SHARD)
    if shard_size is None:
        held = list(itertools.islice(tables, SMALL_SHARDS * SHARD_SIZE // SMALLEST_SHARD))
        shard_size = shard_size_for(sum(table.num_rows for table in held))
        tables = itertools.chain(held, tables)
    cut = _recut(tables, shard_size)
    files: list[PlanFile] = []
    for first in cut:  # of each file
        name = f"plan-{len(files):05d}.parquet"
        file, rows = draft(drafts, name), []
        with pq.ParquetWriter(file.sink, schema, compression="zstd") as writer:
            for table in itertools.chain([first], itertools.islice(cut, SHARDS_PER_FILE - 1)):
                writer.write_table(table, row_group_size=shard_size)
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
        place = table.schema.get_field_index("mtime")
        table = table.set_column(place, "mtime", table["mtime"].cast(pa.int64()))
        own = [field.name for field in OWN]
        carried = [name for name in table.schema.names if name not in own]
        columns = [table[name].to_pylist() for name in (*own, *carried)]
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's own are of these
        raise ResfeatError(
            f"{path}, the listing of shard {shard.number}, cannot be read ({first_line(error)}): "
            "bring it back, or give a new -o"
        ) from error
    rows = zip(*columns, strict=True)
    return [Item._make((*row[: len(own)], row[len(own) :])) for row in rows]


def carried_columns(folder: Location, plan: Plan) -> tuple[pa.Field, ...]:
    """The columns that travel with the items, as the first file of the plan has them."""
    with open_parquet(folder / plan.files[0].name) as file:
        return tuple(file.schema_arrow)[len(OWN) :]


def _tables(listing: Iterable[Item], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    iterator = iter(listing)
    while items := list(itertools.islice(iterator, rows)):
        *own, carried = zip(*items, strict=True)
        columns = zip(schema.names, [*own, *zip(*carried, strict=True)], strict=True)
        yield pa.table(dict(columns), schema=schema)


def _recut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` each, the last one shorter."""
    held = None
    for table in tables:
        held = pa.concat_tables([held, table]) if held else table
        while len(held) >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held:
        yield held
