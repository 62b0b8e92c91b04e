"""A dataset in the forms that other tools take: streamed, and there whole or not at all.

npy    DEST/embeddings.npy, float [N, D] as they are stored, and DEST/ids.parquet, the other columns
clip   the folder of clip-retrieval: DEST/img_emb/img_emb_0.npy, at unit length as its vectors are,
       and DEST/metadata/metadata_0.parquet with the ids as `image_path`; a million rows a file
faiss  DEST/index.faiss, a flat index whose inner product is the cosine, and DEST/ids.parquet
lance  DEST is a table of Lance, with all columns
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.dataset.reader import SENT_BACK, readable
from resfeat.downstream.index import write_index
from resfeat.downstream.unit import unit
from resfeat.errors import ResfeatError, Stopped, UsageError, first_line, missing
from resfeat.runtimes.hardware import memory_bytes
from resfeat.storage import is_remote, open_parquet

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

Form = Literal["npy", "clip", "faiss", "lance"]

ROWS = 4096  # read at once
FILE_ROWS = 1_000_000  # of clip-retrieval's files
# Of the memory that an index may take, since it is built there.
SHARE = 0.5


def export(
    dataset: Dataset,
    form: Form,
    dest: str,
    layer: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Write the dataset at DEST, which must not be there, and give the number of rows.

    layer: which embedding of several; the last by default. stopping: is asked between some rows and
    the next. Raises UsageError where DEST is there or cannot be, where a library is missing, or
    where there are no rows; Stopped where it was stopped.
    """
    target = _target(dest)
    source = _Rows(dataset, dataset.check_layer(layer), stopping)
    write = {"npy": _npy, "clip": _clip, "faiss": _faiss, "lance": _lance}[form]
    with _whole(target) as draft:
        write(source, draft)
        if source.given != source.count:
            raise ResfeatError(f"{dataset.layout.root} was changed while it was read: export again")
    return source.count


class _Rows:
    """The rows as they stand. column: that of the embeddings. count: how many there are, by the
    ends of the files; given: how many were read since then."""

    def __init__(self, dataset: Dataset, column: str, stopping: Callable[[], bool]) -> None:
        self._parts = [
            dataset.layout.embeddings / dataset.layout.part_name(shard)
            for shard in dataset.layout.committed()
        ]
        self._stopping, self._column = stopping, column
        self.count, self.given = 0, 0
        schema: pa.Schema | None = None
        for part in self._parts:
            with readable(part, SENT_BACK), open_parquet(part) as file:
                self.count += file.metadata.num_rows
                schema = schema or file.schema_arrow
        if not self.count or schema is None:
            raise dataset.empty()
        self.schema, self.kind = schema, schema.field(column).type
        others = [field for field in schema if not _is_embedding(field.name)]
        self.others = pa.schema(others, schema.metadata)

    def __iter__(self) -> Iterator[tuple[pa.Table, NDArray[np.floating[Any]]]]:
        """Some rows at a time: their other columns, and their embeddings [n, D] as stored."""
        for batch in self.batches([*self.others.names, self._column]):
            vectors = batch[self._column].flatten().to_numpy(zero_copy_only=False)
            table = pa.Table.from_batches([batch]).select(self.others.names)
            yield table, vectors.reshape(batch.num_rows, -1)

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for part in self._parts:
            with readable(part, SENT_BACK), open_parquet(part) as file:
                for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                    if self._stopping():
                        raise Stopped("stopped: nothing was written")
                    self.given += batch.num_rows
                    yield batch


def _is_embedding(name: str) -> bool:
    return name == "embedding" or name.startswith("embedding_")


def _npy(rows: _Rows, folder: Path) -> None:
    with (
        _array(folder / "embeddings.npy", rows.count, rows.kind) as add,
        pq.ParquetWriter(folder / "ids.parquet", rows.others) as columns,
    ):
        for table, vectors in rows:
            add(vectors)
            columns.write_table(table)


def _clip(rows: _Rows, folder: Path) -> None:
    places = {name: folder / name for name in ("img_emb", "metadata")}
    for place in places.values():
        place.mkdir()
    # As clip-retrieval calls them; a column that was carried may have that name already.
    names = rows.others.names
    if "image_path" not in names:
        names = ["image_path" if name == "id" else name for name in names]
    schema = pa.schema(
        [field.with_name(name) for field, name in zip(rows.others, names, strict=True)]
    )
    files, stream = -(-rows.count // FILE_ROWS), _pieces(rows, FILE_ROWS)
    for number in range(files):
        name = f"{number:0{len(str(files - 1))}}"
        count = min(FILE_ROWS, rows.count - number * FILE_ROWS)
        with (
            _array(places["img_emb"] / f"img_emb_{name}.npy", count, rows.kind) as add,
            pq.ParquetWriter(places["metadata"] / f"metadata_{name}.parquet", schema) as columns,
        ):
            while count > 0 and (piece := next(stream, None)):
                add(_unit(piece[1]))
                columns.write_table(piece[0].rename_columns(names))
                count -= len(piece[0])


def _pieces(rows: _Rows, most: int) -> Iterator[tuple[pa.Table, NDArray[np.floating[Any]]]]:
    """The same rows, cut wherever a file of so many is full."""
    place = 0
    for table, vectors in rows:
        start = 0
        while start < len(table):
            end = min(len(table), start + most - place % most)
            yield table.slice(start, end - start), vectors[start:end]
            place += end - start
            start = end


def _faiss(rows: _Rows, folder: Path) -> None:
    needed = rows.count * rows.kind.list_size * 4
    if needed > SHARE * memory_bytes():
        raise UsageError(
            f"a flat index of {rows.count:,} vectors takes {needed / 1e9:,.1f} GB of memory: "
            "give --to npy, of which FAISS can be given some rows at a time"
        )
    faiss = _library("faiss", "faiss")
    index = faiss.IndexFlatIP(rows.kind.list_size)
    with pq.ParquetWriter(folder / "ids.parquet", rows.others) as columns:
        for table, vectors in rows:
            index.add(_unit(vectors.astype(np.float32)))
            columns.write_table(table)
    write_index(index, folder / "index.faiss")


def _lance(rows: _Rows, folder: Path) -> None:
    lance, schema = _library("lance", "lance"), rows.schema
    batches = (each.replace_schema_metadata(schema.metadata) for each in rows.batches(schema.names))
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(folder))


def _library(name: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing(f"--to {extra}", name, extra) from error


def _unit(vectors: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The same at length 1, and zeros as they are."""
    return unit(vectors.astype(np.float32)).astype(vectors.dtype)


@contextmanager
def _array(
    path: Path, count: int, kind: pa.DataType
) -> Iterator[Callable[[NDArray[np.floating[Any]]], object]]:
    """Write a .npy file of `count` vectors of this kind as they come, by what this gives."""
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, about | {"shape": (count, kind.list_size)})
        yield lambda vectors: file.write(np.ascontiguousarray(vectors).data)


def _target(dest: str) -> Path:
    if is_remote(dest):
        raise UsageError(f"{dest} is in a store: export to a disk, and copy the folder there")
    target = Path(dest).absolute()
    if target.exists() or target.is_symlink():
        raise UsageError(f"{dest} is there already: remove it, or give another DEST")
    if not target.parent.is_dir():
        raise UsageError(f"{dest}: there is no folder {target.parent}: make it first")
    return target


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to write to, beside the target, which it becomes in the end. Whatever goes wrong,
    nothing stays."""
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.mkdir()
        yield draft
        os.rename(draft, target)
    except OSError as error:
        raise ResfeatError(
            f"cannot write {target} ({first_line(error)}): give another DEST"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
