"""Files of rows, streamed some rows at a time: Parquet, Arrow, CSV, TSV, JSON lines, and lists.

What CSV and TSV hold is text, in every column: a type that is guessed from the first rows may not
fit the last. JSON lines have the types of their first rows. A list has a path or an address a line;
blank lines and those that begin with # are passed over.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from resfeat.errors import ResfeatError, UsageError, first_line
from resfeat.sources.rules import printable
from resfeat.storage import Known, Location, locate, open_binary, open_parquet, stat

ROWS = 65536
BLOCK = 8 * 1024**2
# Bytes of a column that are read at once, so that memory does not grow with the row groups.
PARQUET_BUFFER = 1 << 20
LINE = "line"  # what the column of a list is called
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson")
_PARQUET, _ARROW = ".parquet", ".arrow"
TABLES = (*_DELIMITERS, *_JSON, ".txt")
COLUMNAR = (_PARQUET, _ARROW)


class RowFile:
    """A file of rows. version: what it was when it was first looked at. schema: its columns."""

    def __init__(self, path: str) -> None:
        """path: or address. Raises UsageError where it is no such file."""
        self.path, self.location = path, locate(path)
        self.kind = _kind(self.location)
        with self.told(UsageError):
            self.version = version(self.location)
            self.schema = self._schema()

    @property
    def name(self) -> str:
        return printable(self.path)

    @property
    def is_columnar(self) -> bool:
        """Whether it can hold bytes."""
        return self.kind in COLUMNAR

    def check(self, columns: Sequence[str], option: str) -> None:
        """Raise UsageError where it does not have these columns, each once."""
        for column in columns:
            if self.schema.names.count(column) > 1:
                raise UsageError(f"--{option} {column}: {self.name} has several columns called so")
            if column not in self.schema.names:
                raise UsageError(
                    f"--{option} {column}: table {self.name} has no such column: "
                    f"it has {', '.join(self.schema.names) or 'none'}"
                )

    def check_same(self) -> None:
        """Raise ResfeatError if it is not what it was: rows of two files may have been mixed."""
        with self.told():
            now = version(self.location)
        if now != self.version:
            raise ResfeatError(
                f"table {self.name} was changed while it was listed: give the same command again "
                "once it is whole"
            )

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows, at most `ROWS` at a time, of these columns."""
        with self.told():
            for batch in self._batches(list(dict.fromkeys(columns))):
                for start in range(0, batch.num_rows, ROWS):
                    yield batch.slice(start, ROWS)

    @contextmanager
    def told(self, kind: type[ResfeatError] = ResfeatError) -> Iterator[None]:
        """Say of what goes wrong which file it was, and what can be done about it."""
        hint = "mend it, or leave it out of the sources"
        try:
            yield
        except FileNotFoundError as error:
            raise UsageError(f"source {self.name} does not exist: check the path") from error
        except (OSError, ValueError, NotImplementedError) as error:  # Arrow's own are of these
            raise kind(f"table {self.name} cannot be read ({first_line(error)}): {hint}") from error

    def _schema(self) -> pa.Schema:
        if self.kind == _PARQUET:
            with open_parquet(self.location) as file:
                return file.schema_arrow
        if self.kind == _ARROW:
            with open_arrow(self.location) as (reader, _):
                return reader.schema
        if self.kind in _DELIMITERS:
            with self._csv([]) as reader:
                return pa.schema([(name, pa.string()) for name in reader.schema.names])
        if self.kind in _JSON:
            with self._json(None) as reader:
                return pa.schema([field.with_type(_lasting(field.type)) for field in reader.schema])
        return pa.schema([(LINE, pa.string())])

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if self.kind == _PARQUET:
            with open_parquet(self.location, PARQUET_BUFFER) as file:
                yield from file.iter_batches(ROWS, columns=columns, use_threads=False)
        elif self.kind == _ARROW:
            with open_arrow(self.location) as (_, batches):
                yield from (batch.select(columns) for batch in batches)
        elif self.kind in _DELIMITERS:
            with self._csv(columns) as reader:
                yield from reader
        elif self.kind in _JSON:
            with self._json(pa.schema([self.schema.field(name) for name in columns])) as reader:
                yield from (batch.select(columns) for batch in reader)
        else:
            with opened(self.location) as file:
                yield from _lines(file)

    @contextmanager
    def _csv(self, columns: Sequence[str]) -> Iterator[Any]:
        options = pa.csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.string())
        )
        with opened(self.location) as file, pa.csv.open_csv(
            file,
            pa.csv.ReadOptions(use_threads=False, block_size=BLOCK),
            pa.csv.ParseOptions(delimiter=_DELIMITERS[self.kind], newlines_in_values=True),
            options,
        ) as reader:  # fmt: skip
            yield reader

    @contextmanager
    def _json(self, schema: pa.Schema | None) -> Iterator[Any]:
        others = "infer" if schema is None else "ignore"
        parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
        with opened(self.location) as file, pa.json.open_json(
            file, pa.json.ReadOptions(use_threads=False, block_size=BLOCK), parse
        ) as reader:  # fmt: skip
            yield reader


def version(location: Location) -> Known:
    """The mtime and the etag of a file of rows, as of an `Item`."""
    if isinstance(location, Path):
        return location.stat().st_mtime_ns // 1000, None
    return stat(location)[1:]


def is_parquet(location: Location) -> bool:
    return _kind(location) == _PARQUET


def _kind(location: Location) -> str:
    return location.name[location.name.rfind(".") :].lower()


def opened(location: Location, *, mapped: bool = False, version: Known | None = None) -> Any:
    """A file, of Arrow's own kind where it lies on a disk: no thread of Arrow's then has to do with
    what is Python's (apache/arrow#34314). version: as of `open_binary`."""
    if not isinstance(location, Path):
        return open_binary(location, version=version)
    return pa.memory_map(str(location)) if mapped else pa.OSFile(str(location))


@contextmanager
def open_arrow(
    location: Location, version: Known | None = None
) -> Iterator[tuple[Any, Iterator[pa.RecordBatch]]]:
    """An Arrow file, or a stream as `datasets` saves it: its reader, and its batches. On a disk it
    is mapped into memory, so that only what is looked at is read. version: as of `open_binary`."""
    with opened(location, mapped=True, version=version) as file:
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            with pa.ipc.open_stream(file) as stream:
                yield stream, iter(stream)
            return
        with reader:
            yield reader, map(reader.get_batch, range(reader.num_record_batches))


def _lasting(kind: pa.DataType) -> pa.DataType:
    """The type for a column of JSON: text that looked like a time in the first rows is text, and
    so is what had no value there."""
    is_text = pa.types.is_null(kind) or pa.types.is_timestamp(kind)
    return pa.string() if is_text else kind


def _lines(file: Any) -> Iterator[pa.RecordBatch]:
    left = b""
    while block := file.read(BLOCK):
        whole, _, left = (left + block).rpartition(b"\n")
        yield _listed(whole)
    yield _listed(left)


def _listed(lines: bytes) -> pa.RecordBatch:
    text = pa.array([lines.removeprefix(codecs.BOM_UTF8)]).cast(pa.string())  # if it is UTF-8
    paths = pc.split_pattern(text, "\n").flatten()
    if b"\r" in lines:
        paths = pc.utf8_rtrim(paths, "\r")
    is_other = pc.match_substring_regex(paths, r"^(?:#|\s*$)")
    return pa.record_batch({LINE: paths.filter(pc.invert(is_other))})
