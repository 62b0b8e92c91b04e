"""The plan: every item in exactly one shard, in order, whatever the sizes."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import listed

from resfeat.dataset import Layout
from resfeat.errors import ResfeatError
from resfeat.plan import (
    Difference,
    Plan,
    PlanFile,
    Shard,
    addresses,
    carried_columns,
    files,
    read_shard,
    update,
    write_plan,
)
from resfeat.plan.files import shard_size_for
from resfeat.sources.item import Item, table_of, whole


def items(count):
    return [Item(f"dir/{n}.jpg", f"file:///dir/{n}.jpg", n, 1_700_000_000_000_000 + n)
            for n in range(count)]  # fmt: skip


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path)
    layout.plan.mkdir(parents=True)
    layout.tmp.mkdir(parents=True)
    return layout


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 700), size=st.none() | st.integers(1, 300))
def test_every_item_is_in_exactly_one_shard(tmp_path_factory, count, size):
    layout = Layout(tmp_path_factory.mktemp("plan"))
    layout.plan.mkdir(parents=True)
    layout.tmp.mkdir(parents=True)
    made = write_plan(layout.plan, layout.tmp, listed(items(count)), size)
    shards = [read_shard(layout.plan, shard) for shard in made.shards.values()]
    assert list(itertools.chain(*shards)) == items(count)
    assert [len(shard) for shard in shards] == [shard.rows for shard in made.shards.values()]
    assert made.items == count
    assert made.shard_size == (size or shard_size_for(count))


@pytest.mark.parametrize(
    ("count", "size"),
    [(0, 128), (1, 128), (8192, 128), (8193, 256), (120_000, 1920), (262_144, 4096), (10**8, 4096)],
)
def test_small_collections_are_cut_finer(count, size):
    assert shard_size_for(count) == size


def test_a_listing_longer_than_what_is_held_back(layout, monkeypatch):
    monkeypatch.setattr(files, "SHARD_SIZE", 256)
    monkeypatch.setattr(files, "SMALL_SHARDS", 32)  # holds back 32 x 256 rows
    made = write_plan(layout.plan, layout.tmp, listed(items(8192 + 300)), None)
    assert (made.items, len(made.shards), made.shard_size) == (8492, 34, 256)
    assert [len(read_shard(layout.plan, made.shards[n])) for n in (0, 31, 32, 33)] == [
        256,
        256,
        256,
        44,
    ]


def test_one_row_group_a_shard_and_many_shards_a_file(layout):
    made = write_plan(layout.plan, layout.tmp, listed(items(200)), 1)
    files = [pq.ParquetFile(layout.plan / made.files[n].name) for n in range(4)]
    assert [file.num_row_groups for file in files] == [64, 64, 64, 8]
    assert len(made.shards) == 200
    assert read_shard(layout.plan, made.shards[199]) == items(200)[199:]


def test_a_later_generation_says_where_a_shard_is_listed():
    first = PlanFile("plan-00000.parquet", 0, "a" * 64, shards=(0, 1, 2), rows=(5, 5, 3))
    later = PlanFile("plan-00001.parquet", 1, "b" * 64, shards=(3, 1), rows=(2, 4))
    plan = Plan(5, (later, first))
    assert list(plan.shards) == [0, 1, 2, 3]
    assert plan.shards[1] == Shard(1, "plan-00001.parquet", 1, 4, generation=1)
    assert plan.shards[2] == Shard(2, "plan-00000.parquet", 2, 3, generation=0)
    assert plan.items == 5 + 4 + 3 + 2
    assert Plan.from_dict(json.loads(json.dumps(asdict(plan)))) == plan


def test_what_an_item_knows_comes_back_as_it_was_listed(layout):
    """Its place in a file that holds several, its label, and columns that it carries."""
    carried = [pa.field("price", pa.int8()), pa.field("tags", pa.list_(pa.string()))]
    given = [
        Item("a", "file:///x.tar", 7, 1, offset=512, label="cats", carried=(3, ["new", "old"])),
        Item("b", "file:///x.tar", 9, 2, offset=1536, carried=(None, [])),
        Item("c", "file:///c.jpg", 9, 2, label="dogs", carried=(-1, None)),
    ]
    made = write_plan(layout.plan, layout.tmp, listed(given, carried), 2, carried)
    assert [*read_shard(layout.plan, made.shards[0]), *read_shard(layout.plan, made.shards[1])] == (
        given
    )
    assert carried_columns(layout.plan, made) == tuple(carried)
    fields = pq.read_schema(layout.plan / made.files[0].name)
    assert [fields.field(f"carried.{field.name}").type for field in carried] == [
        pa.int8(),
        carried[1].type,
    ]


def test_what_is_read_from_its_beginning_is_one_shard(layout):
    tables = [*listed(items(250)), whole(table_of(items(30))), *listed(items(7))]
    made = write_plan(layout.plan, layout.tmp, tables, 20)
    assert [shard.rows for shard in made.shards.values()] == [20] * 12 + [10, 30, 7]
    assert read_shard(layout.plan, made.shards[13]) == items(30)


def test_a_plan_of_other_rows_is_not_taken_for_what_was_listed(layout):
    made = write_plan(layout.plan, layout.tmp, listed(items(20)), 10)
    path = layout.plan / made.files[0].name
    pq.write_table(pq.read_table(path).slice(1), path, row_group_size=10)
    with pytest.raises(ResfeatError, match=r"listing of shard 1, cannot be read .*not those that"):
        read_shard(layout.plan, made.shards[1])


@pytest.mark.parametrize("left", ["", "half of it", None])
@pytest.mark.parametrize("ask", [carried_columns, addresses])
def test_a_plan_that_cannot_be_read_is_one_line_whoever_asks(layout, ask, left):
    made = write_plan(layout.plan, layout.tmp, listed(items(20)), 10)
    path = layout.plan / made.files[0].name
    path.unlink() if left is None else path.write_text(left)
    with pytest.raises(
        ResfeatError, match=rf"{path.name}, .* cannot be read \(.*\): bring it back"
    ):
        ask(layout.plan, made)


def test_addresses_are_taken_from_all_along_a_listing_and_from_so_many_files(layout, monkeypatch):
    made = write_plan(layout.plan, layout.tmp, listed(items(200)), 1)
    assert len(made.files) == 4
    every = [item.uri for item in items(200) for _ in range(2)]
    assert addresses(layout.plan, made) == every
    monkeypatch.setattr(files, "FILES_SEEN", 2)
    assert addresses(layout.plan, made) == every[:128] + every[256:384]


def test_two_ids_of_one_hash_end_an_update_and_neither_passes_for_gone(layout, monkeypatch):
    made = write_plan(layout.plan, layout.tmp, listed(items(9)), 4)
    assert not Difference(layout.plan, made, listed(items(9))).changes
    hashes = update.hashes

    def weak(column):
        return hashes(column) % np.uint64(7) if pa.types.is_string(column.type) else hashes(column)

    monkeypatch.setattr(update, "hashes", weak)
    with pytest.raises(ResfeatError, match="the same hash"):
        Difference(layout.plan, made, listed(items(9)))
