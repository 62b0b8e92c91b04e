"""`Item`: one input image, and the columns in which a plan has millions of them."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple, cast

import pyarrow as pa

from resfeat.errors import Failure, Reason

# An image's bytes, with the size (bytes) and the mtime (microseconds) that they had when read.
Content = tuple[bytes, int, int | None]


class Item(NamedTuple):
    """One input image, as it was listed. A tuple, since a listing makes millions of them."""

    id: str  # unique in the dataset; of a file, its path relative to the source
    uri: str  # the file or object that holds its bytes, percent-encoded, so that any name survives
    size: int | None  # bytes; None where only reading tells, as of a row of a table
    mtime: int | None  # last modification, microseconds since 1970 in UTC
    etag: str | None = None  # the version that a store has for it
    offset: int | None = None  # in a file of several: the byte where it begins, or its row
    column: str | None = None  # of a row in Parquet or Arrow: the column that holds its bytes
    label: str | None = None  # what `--label-from` makes of its place
    problem: str | None = None  # "reason: message" of a failure that the listing knows already
    carried: tuple[Any, ...] = ()  # what it takes along unchanged: values of `Listing.carried`
    since: int = 0  # the generation of the plan that listed it first as it is now


# The fields of `Item`, in its order. What is carried follows, and may have any name of its own; a
# plan has more behind it.
CARRIED = "carried."
_WHOLE = b"whole"
COLUMNS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("size", pa.int64()),
    pa.field("mtime", pa.timestamp("us", tz="UTC")),
    pa.field("etag", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("column", pa.string()),
    pa.field("label", pa.string()),
    pa.field("problem", pa.string()),
)

# A listing gives a table at least about so often, an empty one if need be: whoever takes them looks
# at signals in between.
BEAT_SECONDS = 0.5


def schema_of(carried: Sequence[pa.Field] = ()) -> pa.Schema:
    """The columns of items that carry these."""
    return pa.schema([*COLUMNS, *(field.with_name(CARRIED + field.name) for field in carried)])


def carried_in(schema: pa.Schema) -> tuple[pa.Field, ...]:
    """The inverse of `schema_of`."""
    fields = (field for field in schema if field.name.startswith(CARRIED))
    return tuple(field.with_name(field.name.removeprefix(CARRIED)) for field in fields)


def table_of(items: Sequence[Item], carried: Sequence[pa.Field] = ()) -> pa.Table:
    """Items as a table of these columns."""
    schema = schema_of(carried)
    if not items:
        return schema.empty_table()
    *own, taken, _ = zip(*items, strict=True)
    columns = zip(schema.names, [*own, *zip(*taken, strict=True)], strict=True)
    return pa.table(dict(columns), schema=schema)


BEAT = table_of(())  # the empty one


def items_of(table: pa.Table) -> list[Item]:
    """The inverse of `table_of`; of a plan's table, too."""
    since = table["since"].to_pylist() if "since" in table.column_names else repeat(0)
    place = table.schema.get_field_index("mtime")
    table = table.set_column(place, "mtime", table["mtime"].cast(pa.int64()))
    own = len(COLUMNS)
    columns = table.columns[: own + len(carried_in(table.schema))]
    values = [column.to_pylist() for column in columns]
    carried = zip(*values[own:], strict=True) if values[own:] else repeat(())
    return list(map(Item._make, zip(*values[:own], carried, since, strict=False)))


def whole(table: pa.Table) -> pa.Table:
    """The same items, to be one shard: of what can only be read from its beginning."""
    return table.replace_schema_metadata({_WHOLE: ""})


def stays_whole(table: pa.Table) -> bool:
    """Whether the items of a table are to be one shard."""
    return _WHOLE in (table.schema.metadata or {})


def problem(reason: Reason, message: str) -> str:
    """What `Item.problem` says."""
    return f"{reason}: {message}"


def failure_of(item: Item) -> Failure | None:
    """The failure that was known when the item was listed."""
    if item.problem is None:
        return None
    reason, _, message = item.problem.partition(": ")
    return Failure("read", cast(Reason, reason), message)
