"""The plan: every item in exactly one shard, in order, whatever the sizes."""

import itertools

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resfeat import plan
from resfeat.dataset import Layout
from resfeat.plan import read_shard, write_plan
from resfeat.plan.files import shard_size_for
from resfeat.sources.item import Item


def items(count):
    return [Item(f"dir/{n}.jpg", f"file:///dir/{n}.jpg", n, 1_700_000_000_000_000 + n)
            for n in range(count)]  # fmt: skip


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path)
    layout.plan.mkdir(parents=True)
    layout.tmp.mkdir()
    return layout


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 700), size=st.none() | st.integers(1, 300))
def test_every_item_is_in_exactly_one_shard(tmp_path_factory, count, size):
    layout = Layout(tmp_path_factory.mktemp("plan"))
    layout.plan.mkdir(parents=True)
    layout.tmp.mkdir()
    made = write_plan(layout.plan, layout.tmp, items(count), size)
    shards = [read_shard(layout.plan, shard) for shard in made.shards.values()]
    assert list(itertools.chain(*shards)) == items(count)
    assert [len(shard) for shard in shards] == [shard.rows for shard in made.shards.values()]
    assert made.items == count
    assert made.shard_size == (size or shard_size_for(count))


@pytest.mark.parametrize(
    ("count", "size"),
    [(0, 128), (1, 128), (500, 128), (4096, 128), (4097, 256), (131_072, 4096), (10**8, 4096)],
)
def test_small_collections_are_cut_finer(count, size):
    assert shard_size_for(count) == size


def test_a_listing_longer_than_what_is_held_back(layout, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_SIZE", 256)  # holds back 32 x 256 rows
    made = write_plan(layout.plan, layout.tmp, iter(items(8192 + 300)), None)
    assert (made.items, len(made.shards), made.shard_size) == (8492, 34, 256)
    assert [len(read_shard(layout.plan, made.shards[n])) for n in (0, 31, 32, 33)] == [
        256,
        256,
        256,
        44,
    ]


def test_one_row_group_a_shard_and_many_shards_a_file(layout):
    made = write_plan(layout.plan, layout.tmp, items(200), 1)
    files = [pq.ParquetFile(layout.plan / made.files[n].name) for n in range(4)]
    assert [file.num_row_groups for file in files] == [64, 64, 64, 8]
    assert len(made.shards) == 200
    assert read_shard(layout.plan, made.shards[199]) == items(200)[199:]
