"""Tables: each row says where an image is, or holds it.

Only the columns that are asked for are read, and no image. A table is read twice, once for its ids.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from resfeat.errors import UsageError
from resfeat.sources import rows
from resfeat.sources.addresses import Addresses, folders, shown
from resfeat.sources.formats import RowFile
from resfeat.sources.item import CARRIED, schema_of
from resfeat.sources.rows import Leaf, Stretch
from resfeat.sources.rules import printable
from resfeat.spec import SourceOptions
from resfeat.storage import Known

# What a column of addresses is often called, whatever else the table has.
USUAL = ("uri", "url", "path", "file", "filename", "file_name", "file_path", "filepath", "image",
         "image_path", "image_url", "image_uri", "img_path")  # fmt: skip
_AS_STORED = {
    pa.date64(): pa.date32(),
    pa.time32("s"): pa.time32("ms"),
    pa.string_view(): pa.string(),
    pa.binary_view(): pa.binary(),
}


@dataclass
class _Table:
    """A table, and which of its columns is what. image: where it has the images itself; uri: else,
    the column of their addresses."""

    file: RowFile
    image: Leaf | None
    uri: str | None

    def stretches(self, columns: Sequence[str]) -> Iterator[Stretch]:
        """All its rows, with these columns."""
        if not self.uri:
            assert self.image
            yield from rows.stretches(self.file, self.image, columns)
            return
        first = 0
        for batch in self.file.batches([*columns, self.uri]):
            found = {name: batch[name] for name in columns}
            yield Stretch(first, batch.num_rows, found, _text(batch[self.uri]))
            first += batch.num_rows


class Tables:
    """One or more tables and files of images; see `listing.Part`. is_by_place: whether all ids are
    the places of rows."""

    def __init__(self, roots: Sequence[str], base: str, options: SourceOptions) -> None:
        """roots: paths or addresses. base: what the ids of rows leave out of them. Raises
        UsageError where one has not the columns that are asked for."""
        self._options, self._base, self.skipped = options, base, Counter[str]()
        self._tables = [self._table(RowFile(root)) for root in roots]
        self.carried = self._carried()
        self.is_by_place = not (options.id_column or any(table.uri for table in self._tables))

    def _table(self, file: RowFile) -> _Table:
        options = self._options
        file.check(options.keep, "keep")
        if options.id_column:
            file.check([options.id_column], "id-column")
            _check_text(file, options.id_column, "id-column")
        if not options.uri_column and (leaf := rows.leaf_of(file, options.image_column)):
            if leaf.column in options.keep:
                raise UsageError(f"--keep {leaf.column}: it holds the images of {file.name}")
            return _Table(file, leaf, None)
        column = options.uri_column or _usual(file)
        file.check([column], "uri-column")
        _check_text(file, column, "uri-column")
        return _Table(file, None, column)

    def _carried(self) -> tuple[pa.Field, ...]:
        found: dict[str, pa.Field] = {}
        for table in self._tables:
            for name in self._options.keep:
                kind = _stored(table.file.schema.field(name).type)
                if (first := found.setdefault(name, pa.field(name, kind))).type != kind:
                    raise UsageError(
                        f"--keep {name}: it is {first.type} in {self._tables[0].file.name} and "
                        f"{kind} in {table.file.name}: give it one type, or make two datasets"
                    )
        return tuple(found.values())

    def ids(self) -> Iterator[pa.Array]:
        """The ids in the order of the items."""
        columns = [self._options.id_column] if self._options.id_column else []
        for table in self._tables:
            for some in table.stretches(columns):
                yield self._ids(table, some)

    def tables(self) -> Iterator[pa.Table]:
        options = self._options
        columns = [*options.keep, *([options.id_column] if options.id_column else [])]
        for table in self._tables:
            addresses = Addresses(os.path.dirname(table.file.path))
            container = addresses.uri(os.path.basename(table.file.path))[0]
            version = table.file.version
            for some in table.stretches(columns):
                if some.addresses is None and table.image:
                    own = _of_rows(some, container, table.image.bytes, version)
                else:
                    own = _of_addresses(some, addresses)
                own["id"] = self._ids(table, some)
                if options.label_from:
                    own["label"] = folders(own["uri"])
                yield self._whole(own, some)
            table.file.check_same()

    def _ids(self, table: _Table, some: Stretch) -> pa.Array:
        """A column of the table, or its addresses; of a row that has none, its place."""
        ids = pa.nulls(some.count, pa.string())
        if self._options.id_column:
            ids = _text(some.columns[self._options.id_column])
        elif table.uri:
            ids = shown(some.addresses)
        is_there = pc.fill_null(pc.not_equal(ids, ""), False)
        if pc.all(is_there).as_py():
            return ids
        name = printable(table.file.path.removeprefix(self._base))
        places = pc.binary_join_element_wise(name, _text(_numbers(some)), "#")
        return pc.if_else(is_there, ids, places)

    def _whole(self, own: dict[str, pa.Array], some: Stretch) -> pa.Table:
        schema = schema_of(self.carried)
        for field in self.carried:
            own[CARRIED + field.name] = some.columns[field.name].cast(field.type)
        return pa.table(
            [own.get(field.name, pa.nulls(some.count, field.type)) for field in schema], schema
        )


def _of_rows(some: Stretch, uri: str, column: str, version: Known) -> dict[str, pa.Array]:
    """What is known of images that are in the rows themselves."""
    mtime, etag = version
    same = {
        "uri": pa.scalar(uri),
        "mtime": pa.scalar(mtime, pa.timestamp("us", tz="UTC")),
        "etag": pa.scalar(etag, pa.string()),
        "column": pa.scalar(column),
    }
    columns = {name: pa.repeat(value, some.count) for name, value in same.items()}
    return columns | {"offset": _numbers(some)}


def _numbers(some: Stretch) -> pa.Array:
    """Those of its rows."""
    return pa.array(np.arange(some.first, some.first + some.count))


def _of_addresses(some: Stretch, addresses: Addresses) -> dict[str, pa.Array]:
    uris, problems = addresses.uris(_text(some.addresses))
    return {"uri": uris, "problem": problems}


def _stored(kind: pa.DataType) -> pa.DataType:
    """The type in which values of this one are listed: one that Parquet gives back as it is, so
    that an update finds no difference, and whose rows Arrow can pick out."""
    if pa.types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    return _AS_STORED.get(kind, kind)


def _text(column: pa.Array) -> pa.Array:
    return column.cast(pa.string())


def _check_text(file: RowFile, column: str, option: str) -> None:
    kind = file.schema.field(column).type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    try:
        if is_bytes or pa.types.is_fixed_size_binary(kind):
            raise pa.ArrowNotImplementedError("bytes need not be text")
        pa.nulls(0, kind).cast(pa.string())
    except pa.ArrowNotImplementedError as error:
        raise UsageError(
            f"--{option} {column}: in {file.name} it is {kind}: give a column of text"
        ) from error


def _usual(file: RowFile) -> str:
    """The column of addresses, if it is clear which that is."""
    kinds: dict[str, pa.DataType] = {field.name: field.type for field in file.schema}
    texts = [name for name, kind in kinds.items() if _is_text(kind)]
    named = [name for name in texts if name.lower() in USUAL]
    for some in named, texts:
        if len(some) == 1:
            return some[0]
    raise UsageError(
        f"which column of {file.name} says where the images are? Give --uri-column: it has "
        f"{', '.join(kinds) or 'none'}"
    )


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(test(kind) for test in tests)
