"""Embeddings as they lie in a file: what Arrow reads, in any layout, and faster in ours."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resfeat.dataset import vectors
from resfeat.storage import extents


def write(path, made, *, groups=(), **options):
    """A part with vectors [n, D] in two columns, the second reversed."""
    kind = pa.from_numpy_dtype(made.dtype)
    ids = pa.array([f"a/{n}.jpg" for n in range(len(made))])
    columns = {"id": ids}
    for name, some in (("embedding_a", made), ("embedding_b", made[::-1])):
        flat = pa.array(np.ascontiguousarray(some).reshape(-1))
        value = pa.field("element", kind, nullable=False)
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(value, made.shape[1]))
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    table = pa.table(columns, schema=pa.schema(fields))
    usual = {"compression": {"id": "zstd"}, "use_dictionary": ["id"], "write_statistics": ["id"]}
    with pq.ParquetWriter(path, table.schema, **usual | options) as writer:
        for start, end in zip((0, *groups), (*groups, len(made)), strict=True):
            writer.write_table(table.slice(start, end - start), row_group_size=max(1, len(made)))


def read(path, column, rows):
    some = list(vectors.rows_in(path, column, rows))
    assert all(len(ids) == len(block) <= rows for ids, block in some)
    assert all(block.dtype == np.float32 for _, block in some)
    ids = [name for names, _ in some for name in names.to_pylist()]
    return ids, np.concatenate([block for _, block in some]) if some else None


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    length=st.sampled_from([1, 3, 64, 1000]),
    dtype=st.sampled_from([np.float32, np.float16]),
    rows=st.integers(1, 400),
    page=st.sampled_from([64, 1000, 5000, 1 << 20]),
    cut=st.floats(0, 1),
)
def test_in_our_layout_the_bytes_of_the_file_are_what_arrow_reads(
    tmp_path_factory, n, length, dtype, rows, page, cut
):
    path = tmp_path_factory.mktemp("part") / "part.parquet"
    made = np.random.default_rng(n).standard_normal((n, length)).astype(dtype)
    first = min(int(cut * n), n - 1)  # rows in the first of two groups, which are never empty
    write(path, made, groups=[first] if first else [], data_page_size=page)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(vectors, "_by_arrow")
        for column, expected in (("embedding_a", made), ("embedding_b", made[::-1])):
            ids, given = read(path, column, rows)
            assert ids == [f"a/{k}.jpg" for k in range(n)]
            assert np.array_equal(given, expected.astype(np.float32))
            check_some(path, column, expected.astype(np.float32), cut)


def check_some(path, column, expected, share):
    """A share of the rows, by their places and by their ids."""
    some = np.flatnonzero(np.random.default_rng(0).random(len(expected)) < share)
    given = vectors.vectors_at(path, column, some)
    assert given.dtype == np.float32 and np.array_equal(given, expected[some])
    asked = pa.array([f"a/{n}.jpg" for n in [*some[::-1], len(expected)]])
    ids, given = vectors.rows_of(path, column, asked)
    assert ids.to_pylist() == [f"a/{n}.jpg" for n in some]
    assert given.dtype == np.float32 and np.array_equal(given, expected[some])


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"column_encoding": {"embedding_a.list.element": "BYTE_STREAM_SPLIT"}},
        {"write_statistics": True},
    ],
    ids=str,
)
def test_any_other_layout_is_read_as_well(tmp_path, options):
    made = np.random.default_rng(0).integers(0, 9, (500, 40)).astype(np.float32)
    write(tmp_path / "part.parquet", made, data_page_size=2000, **options)
    ids, given = read(tmp_path / "part.parquet", "embedding_a", 70)
    assert np.array_equal(given, made) and ids[-1] == "a/499.jpg"
    check_some(tmp_path / "part.parquet", "embedding_b", made[::-1], 0.3)


def test_a_damaged_page_is_never_taken_for_numbers(tmp_path):
    """Whichever byte of a header is another one: what is found lies within the column."""
    path = tmp_path / "part.parquet"
    made = np.ones((50, 8), np.float32)
    write(path, made)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    whole, start = path.read_bytes(), chunk.data_page_offset
    end = start + chunk.total_compressed_size
    (found,) = extents(pa.BufferReader(whole), chunk, 4)
    assert whole[found[0] :][: found[1]] == made.tobytes()
    for at in range(start, found[0]):
        for value in range(0, 256, 5):
            changed = whole[:at] + bytes([value]) + whole[at + 1 :]
            places = extents(pa.BufferReader(changed), chunk, 4)
            assert places is None or all(
                start < place and place + size <= end for place, size in places
            )
            assert places is None or sum(size for _, size in places) == found[1]
