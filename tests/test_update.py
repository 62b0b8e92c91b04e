"""The difference between a plan and a new listing, held against a model of dictionaries."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import listed

from resfeat.dataset import Layout
from resfeat.errors import ResfeatError
from resfeat.plan import Difference, changed_since, read_shard, update, write_plan
from resfeat.plan.files import read_rows
from resfeat.sources.item import Item, table_of, whole

SIZE = 3
CARRIED = (pa.field("price", pa.float64()), pa.field("tags", pa.list_(pa.string())))
FIELDS = {
    "uri": st.sampled_from(["file:///a", "file:///b"]),
    "size": st.none() | st.integers(0, 2),
    "mtime": st.none() | st.integers(1, 2),
    "etag": st.none() | st.sampled_from(["", "x"]),
    "offset": st.none() | st.integers(0, 2),
    "label": st.none() | st.sampled_from(["", "cats"]),
    "problem": st.none() | st.just("io_error: no"),
    "carried": st.tuples(
        st.sampled_from([None, 0.5, float("inf")]),
        st.sampled_from([None, [], ["new"], ["x", None]]),
    ),
}  # fmt: skip
VERSIONS = st.fixed_dictionaries(FIELDS)
LISTINGS = st.dictionaries(st.integers(0, 11), VERSIONS, max_size=12)


def items(listing):
    """Items of a listing, in the order of their ids; half of them are no ASCII."""
    return [Item(id=name(number), **known) for number, known in sorted(listing.items())]


def name(number):
    return f"{number:02}{'é' * (number % 2)}.jpg"


def version(item):
    """What of an item makes it another one. What has an etag may be touched."""
    return item._replace(since=0, mtime=None if item.etag is not None else item.mtime)


@pytest.fixture(scope="module")
def new_layout(tmp_path_factory):
    def make():
        layout = Layout(tmp_path_factory.mktemp("update"))
        for folder in layout.folders:
            folder.mkdir(parents=True)
        return layout

    return make


@settings(max_examples=40)
@given(first=LISTINGS.filter(len), later=st.lists(LISTINGS, min_size=1, max_size=5))
def test_the_plan_follows_any_listings(new_layout, first, later):
    layout = new_layout()
    folder = layout.plan
    plan = write_plan(folder, layout.tmp, listed(items(first), CARRIED), SIZE, CARRIED)
    known = {item.id: item for item in items(first)}  # as it is listed
    # The shard of each id, for ever.
    home = {item.id: place // SIZE for place, item in enumerate(items(first))}
    last = dict.fromkeys(known, (0, "added"))  # when something happened to it, and what
    for listing in later:
        now = {item.id: item for item in items(listing)}
        added = now.keys() - known.keys()
        removed = known.keys() - now.keys()
        changed = {
            each for each in now.keys() & known if version(now[each]) != version(known[each])
        }
        kept = known.keys() - removed - changed
        found = Difference(folder, plan, listed(now.values(), CARRIED))
        counts = {"added": added, "changed": changed, "removed": removed, "kept": kept}
        assert vars(found.changes) == {kind: len(ids) for kind, ids in counts.items()}
        assert bool(found.changes) == bool(added or changed or removed)
        touched = {home[each] for each in (added | changed | removed) & home.keys()}
        assert [shard.number for shard in found.touched] == sorted(touched)
        new = [each for each in now if each not in home]
        assert found.new_shards == -(-len(new) // SIZE)
        if not found.changes:
            continue

        before, plan = plan, found.write(layout.tmp)
        generation = plan.generation
        assert generation == before.generation + 1
        first_new = max(before.shards) + 1
        home |= {each: first_new + place // SIZE for place, each in enumerate(new)}
        assert plan.shards.keys() == set(home.values())
        for number, shard in plan.shards.items():
            is_anew = number in touched or number >= first_new
            assert shard.generation == (generation if is_anew else before.generation_of(number))
            assert is_anew or shard == before.shards[number]
        assert {file.name for file in plan.files} == {shard.file for shard in plan.shards.values()}
        for kind in ("added", "changed", "removed"):
            last |= dict.fromkeys(counts[kind], (generation, kind))
        # What was not changed stays as it was listed then, to the last column.
        known = {each: known[each] if each in kept else now[each] for each in now}
        check(layout, plan, known, home, last)


def check(layout, plan, known, home, last):
    there = {}
    for number, shard in plan.shards.items():
        rows = read_rows(layout.plan, shard)
        assert {home[each] for each in rows["id"].to_pylist()} == {number}
        for item in read_shard(layout.plan, shard):
            assert item.id not in there
            there[item.id] = item
        assert len(set(rows["id"].to_pylist())) == rows.num_rows
    assert there == {each: item._replace(since=last[each][0]) for each, item in known.items()}
    assert plan.items == len(known)
    for since in range(plan.generation + 1):
        changes = changed_since(layout.plan, plan, since).to_pylist()
        assert sorted((each["id"], each["change"]) for each in changes) == sorted(
            (each, kind) for each, (generation, kind) in last.items() if generation > since
        )


def plain(count, start=0):
    return [Item(f"{n:03}", f"file:///{n}", 1, 1) for n in range(start, start + count)]


def test_what_is_read_from_its_beginning_stays_one_shard(new_layout):
    layout = new_layout()
    tar = [Item(f"t#{n}", "file:///t.tar.gz", 1, 1, offset=n) for n in range(8)]
    plan = write_plan(layout.plan, layout.tmp, [*listed(plain(4)), whole(table_of(tar))], SIZE)
    assert [shard.rows for shard in plan.shards.values()] == [3, 1, 8]
    # Written again: other members, in another order.
    again = [item._replace(mtime=2, offset=20 - place) for place, item in enumerate(tar[1:])]
    new = [Item(f"t#new{n}", "file:///t.tar.gz", 1, 2, offset=30 + n) for n in range(5)]
    tables = [*listed(plain(4)), whole(table_of([*again[::-1], *new])), *listed(plain(2, 50))]
    found = Difference(layout.plan, plan, tables)
    assert vars(found.changes) == {"added": 7, "changed": 7, "removed": 1, "kept": 4}
    plan = found.write(layout.tmp)
    assert [shard.rows for shard in plan.shards.values()] == [3, 1, 7, 5, 2]
    assert read_shard(layout.plan, plan.shards[3]) == [each._replace(since=1) for each in new]
    # In the order in which they lie now.
    offsets = [item.offset for item in read_shard(layout.plan, plan.shards[2])]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize(
    ("kind", "values"), [(pa.int64(), [None, 0, 1]), (pa.string(), [None, "", "a"])]
)
def test_null_is_another_value_than_nothing(kind, values, new_layout):
    layout, carried = new_layout(), [pa.field("kept", kind)]

    def keeping(value):
        return listed([each._replace(carried=(value,)) for each in plain(4)], carried)

    plan = write_plan(layout.plan, layout.tmp, keeping(values[0]), SIZE, carried)
    for value in values:
        changed = 0 if value is None else 4
        assert Difference(layout.plan, plan, keeping(value)).changes.changed == changed


@pytest.mark.parametrize("name", ["size", "etag", "uri", "offset", "column", "label", "problem"])
def test_all_that_an_item_is_has_a_part_in_its_version(name):
    item = Item("a", "b", 1, 2, "c", 3, "d", "e", "f")
    other = item._replace(**{name: 9 if name in ("size", "offset") else "other"})
    first, second = (update.versions_of(table_of([each])) for each in (item, other))
    assert first != second


def test_two_ids_of_one_hash_are_found_out(new_layout, monkeypatch):
    layout = new_layout()
    plan = write_plan(layout.plan, layout.tmp, listed(plain(4)), SIZE)
    real = update.hashes

    def hashes(column):
        return real(pc.if_else(pc.equal(column, "009"), "003", column))

    monkeypatch.setattr(update, "hashes", hashes)
    monkeypatch.setattr(update, "versions_of", lambda table: real(table["id"]))
    found = Difference(layout.plan, plan, listed([*plain(3), *plain(1, 9)]))
    with pytest.raises(ResfeatError, match="two ids have the same hash"):
        found.write(layout.tmp)


def test_files_of_a_killed_update_are_written_over(new_layout):
    """Its generation was never current: the next one has the same number, and other files."""
    layout = new_layout()
    plan = write_plan(layout.plan, layout.tmp, listed(plain(4)), SIZE)
    Difference(layout.plan, plan, listed(plain(9))).write(layout.tmp)
    left = {path.name for path in layout.plan.iterdir()}
    plan = Difference(layout.plan, plan, listed(plain(5))).write(layout.tmp)
    assert plan.generation == 1 and {path.name for path in layout.plan.iterdir()} == left
    assert plan.items == 5
    for file in plan.files:
        assert pq.ParquetFile(layout.plan / file.name).num_row_groups == len(file.shards)


def test_a_plan_of_many_files_is_followed_file_by_file(new_layout):
    """Those that list no shard any more go, the others stay."""
    layout = new_layout()
    many = plain(200)
    plan = write_plan(layout.plan, layout.tmp, listed(many), 1)
    assert len(plan.files) == 4
    touched = [item._replace(mtime=2) if place < 70 else item for place, item in enumerate(many)]
    after = Difference(layout.plan, plan, listed(touched)).write(layout.tmp)
    assert [file.name for file in after.files] == [
        *(file.name for file in plan.files[1:]),
        "plan-1-00000.parquet",
        "plan-1-00001.parquet",
    ]
    assert after.items == 200 and list(after.shards) == list(range(200))
    assert replace(after.shards[150]) == plan.shards[150]
