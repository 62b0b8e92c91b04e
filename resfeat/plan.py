"""The frozen listing, cut into shards.

A plan is a folder of Parquet files in which each row group is one shard, so a worker reads its own
rows and nothing else. Both sides are streamed: memory does not grow with the number of items.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from resfeat.errors import ResfeatError
from resfeat.layout import Layout
from resfeat.sources.item import Item
from resfeat.store import StoreError, draft, open_parquet, sha256

SHARD_SIZE = 4096
SHARDS_PER_FILE = 64

# A small collection is cut finer, so that all workers have work and a crash costs little.
SMALL_SHARDS = 32
SMALLEST_SHARD = 128

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


@dataclass(frozen=True)
class Plan:
    """How many items there are and how they are cut. digests: SHA-256 of the plan's files."""

    items: int
    shards: int
    shard_size: int
    digests: tuple[str, ...] = ()

    def length(self, shard: int) -> int:
        """Items in one shard; only the last may be short."""
        return min(self.shard_size, self.items - shard * self.shard_size)


def shard_size_for(items: int) -> int:
    """The default shard size: 4,096, or the multiple of 128 that gives about 32 shards."""
    wanted = -(-items // SMALL_SHARDS)
    return min(SHARD_SIZE, max(SMALLEST_SHARD, -(-wanted // SMALLEST_SHARD) * SMALLEST_SHARD))


def write_plan(layout: Layout, listing: Iterable[Item], shard_size: int | None) -> Plan:
    """Write the listing as it comes, cut into shards. A pure function of both arguments.

    Where no shard size is given, as many rows as the largest default needs are held back until it
    is clear how long the listing is.
    """
    tables = _tables(listing, shard_size or SMALLEST_SHARD)
    held: list[pa.Table] = []
    if shard_size is None:
        held = list(itertools.islice(tables, SMALL_SHARDS * SHARD_SIZE // SMALLEST_SHARD))
        shard_size = shard_size_for(sum(table.num_rows for table in held))
        held = list(_recut(held, shard_size))
    items = shards = 0
    digests = []
    cut = itertools.chain(held, _recut(tables, shard_size))
    for number, first in enumerate(cut):  # of each file
        file = draft(layout.tmp, layout.plan_file(number).name)
        with pq.ParquetWriter(file.sink, SCHEMA, compression="zstd") as writer:
            for table in itertools.chain([first], itertools.islice(cut, SHARDS_PER_FILE - 1)):
                writer.write_table(table, row_group_size=shard_size)
                items += table.num_rows
                shards += 1
        digests.append(sha256(file))
        file.publish(layout.plan_file(number))
    return Plan(items, shards, shard_size, tuple(digests))


def read_shard(layout: Layout, shard: int) -> list[Item]:
    """The items of one shard, in plan order. Raises ResfeatError where the plan cannot be read."""
    number, row_group = divmod(shard, SHARDS_PER_FILE)
    try:
        with open_parquet(layout.plan_file(number)) as file:
            table = file.read_row_group(row_group, use_threads=False).select(SCHEMA.names)
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's own are of these
        reason = str(error).partition("\n")[0]
        raise ResfeatError(
            f"{layout.plan_file(number)}, the listing of shard {shard}, cannot be read ({reason}): "
            "bring it back, or give a new -o"
        ) from error
    mtimes = table["mtime"].cast(pa.int64()).to_pylist()
    columns = (table["id"].to_pylist(), table["uri"].to_pylist(), table["size"].to_pylist(), mtimes)
    return [Item(*row) for row in zip(*columns, strict=True)]


def _tables(listing: Iterable[Item], rows: int) -> Iterator[pa.Table]:
    iterator = iter(listing)
    while items := list(itertools.islice(iterator, rows)):
        yield pa.table(
            {
                "id": [item.id for item in items],
                "uri": [item.uri for item in items],
                "size": [item.size for item in items],
                "mtime": pa.array([item.mtime for item in items], SCHEMA.field("mtime").type),
            },
            schema=SCHEMA,
        )


def _recut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` each, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows)
            held, count = [whole.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held)
