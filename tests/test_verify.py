"""Looking at every row: on small datasets of invented vectors, damaged in ways that take luck."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import add, listed, planned

from resfeat.backbones.weights import resolve
from resfeat.dataset import (
    FailedItem,
    Layout,
    Part,
    Record,
    Row,
    embeddings_schema,
    kept_rows,
    open_dataset,
)
from resfeat.dataset import verify as verification
from resfeat.dataset.lock import run_lock
from resfeat.dataset.notes import Note
from resfeat.dataset.verify import repair, verify
from resfeat.errors import Failure, ResfeatError, StoreError
from resfeat.plan import write_plan
from resfeat.sources.item import Item
from resfeat.spec import FeatureSpec, SourceOptions

SHARDS, SHARD, DIM = 4, 6, 8
DIMS = {"layer3": DIM, "avgpool": DIM}
FAILED = (1, 8, 9, *range(12, 18))  # none in the last shard, all in the one before


@pytest.fixture(scope="module")
def record():
    features = FeatureSpec(model="resnet18", weights="random:0", layers=("layer3", "avgpool"))
    identity = resolve(features).identity
    return lambda plan: Record(
        identity=identity, weights="random:0", sources=("/photos",), plan=plan,
        source_options=SourceOptions(),
        created="2026-01-01T00:00:00+00:00", versions={"resfeat": "0"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(record, tmp_path_factory):
    """A finished dataset. Not to be changed."""
    layout = Layout(tmp_path_factory.mktemp("whole"))
    for folder in layout.folders:
        folder.mkdir(parents=True)
    count = SHARDS * SHARD
    items = [Item(f"{n:02}.jpg", f"/photos/{n:02}.jpg", 1000 + n, n) for n in range(count)]
    record(write_plan(layout.plan, layout.tmp, listed(items), SHARD)).save(layout)
    for shard in range(SHARDS):
        do(layout, shard)
    return open_dataset(layout.root)


def do(layout, shard):
    """What a worker makes of a shard, always the same."""
    identity = open_dataset(layout.root).record.identity
    items = planned(layout, shard)
    good = [item for item in items if item.mtime not in FAILED]
    failure = Failure("decode", "truncated", "cut off")
    failed = [FailedItem(item.id, item.uri, failure) for item in items if item not in good]
    rows = [Row(item.id, 640, 480, item.size, item.mtime) for item in good]
    noise = np.random.default_rng(shard).random((len(good), 2 * DIM), np.float32)
    with Part(layout, shard, embeddings_schema(identity, DIMS, with_label=False)) as part:
        add(part, rows, noise, failed)
        part.commit(item.id for item in items)


@pytest.fixture
def dataset(whole, tmp_path):
    """The same, of one's own."""
    shutil.copytree(whole.layout.root, tmp_path / "out")
    return open_dataset(tmp_path / "out")


def content(layout):
    return {
        path.relative_to(layout.root): path.read_bytes()
        for path in layout.root.rglob("*")
        if path.is_file() and path != layout.lock
    }


def rewrite(dataset, shard, change):
    """A part as if it had been committed like that."""
    part = dataset.layout.embeddings / dataset.layout.part_name(shard)
    pq.write_table(change(pq.read_table(part)), part)
    place = dataset.layout.note(shard)
    noted = json.loads(place.read_text())
    noted["digests"]["embeddings"] = hashlib.sha256(part.read_bytes()).hexdigest()
    place.write_text(json.dumps(noted))
    return str(part)


def with_column(name, values):
    return lambda table: table.set_column(
        table.schema.names.index(name), name, pa.array(values, table.schema.field(name).type)
    )


def found(dataset):
    return [(each.kind, each.path) for each in verify(dataset).problems]


def test_a_whole_dataset(whole):
    seen = []
    looked = verify(whole, lambda: seen.append(1))
    assert looked.problems == [] and looked.bad_shards == []
    assert (looked.shards, looked.embedded, looked.failed, looked.duplicates) == (4, 15, 9, 0)
    assert len(seen) == SHARDS


@pytest.mark.parametrize("layer", DIMS)
@pytest.mark.parametrize("value", [0, 0.5, np.nan, -np.inf])
def test_a_bad_vector_in_any_layer(value, layer, dataset):
    def change(table):
        lists = table[f"embedding_{layer}"].to_pylist()
        lists[2] = [value] * DIM
        return with_column(f"embedding_{layer}", lists)(table)

    part = rewrite(dataset, 0, change)
    (problem,) = verify(dataset).problems
    assert (problem.kind, problem.path, problem.shard) == ("values", part, 0)
    assert "1 vectors are" in problem.message and "03.jpg" in problem.message


def test_of_vectors_of_one_number_zero_alone_is_wrong():
    bad = verification._bad_values(pa.chunked_array([["a", "b"]]), [np.array([[3.0], [0.0]])])
    assert list(bad) == ["1 vectors are zero or constant, the first that of b"]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["embedding_layer3"]),
        lambda table: table.rename_columns(["name", *table.schema.names[1:]]),
        lambda table: with_column("embedding_avgpool", [None, *[[1.0] * DIM] * 4])(table),
        lambda table: with_column("embedding_avgpool", [[None, *[1.0] * (DIM - 1)]] * 5)(table),
        lambda table: with_column("id", [None, *"abcd"])(table),
        lambda table: table.cast(
            table.schema.set(1, pa.field("embedding_layer3", pa.list_(pa.float32())))
        ),
        lambda table: table.cast(
            table.schema.set(1, pa.field("embedding_layer3", pa.list_(pa.float64(), DIM)))
        ),
    ],
    ids="no-layer no-id null-vector null-value null-id lists doubles".split(),
)
def test_a_part_with_other_columns(change, dataset):
    """Parquet that anybody can read, and is not what this dataset's parts are."""

    def loosely(table):
        loose = [
            pa.field(
                field.name, pa.list_(pa.float32(), DIM) if "embedding" in field.name else field.type
            )
            for field in table.schema
        ]
        return change(table.cast(pa.schema(loose, table.schema.metadata)))

    part = rewrite(dataset, 0, loosely)
    assert found(dataset) == [("unreadable", part)]


def test_a_part_of_another_dataset(dataset, record, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dataset.layout.root, other)
    shutil.rmtree(other / "embeddings")
    layout = Layout(other)
    layout.embeddings.mkdir()
    was = record(dataset.record.plan)
    replace(was, identity=replace(was.identity, weights_digest="0" * 64)).save(layout)
    do(layout, 0)
    part = dataset.layout.embeddings / dataset.layout.part_name(0)
    shutil.copy(layout.embeddings / part.name, part)
    assert set(found(dataset)) == {("checksum", str(part)), ("identity", str(part))}
    # And where even its checksum was brought along, the fingerprint tells.
    shutil.copy(layout.note(0), dataset.layout.note(0))
    assert found(dataset) == [("identity", str(part))]


def test_an_unknown_reason(dataset):
    path = dataset.layout.failures / dataset.layout.part_name(0)
    pq.write_table(with_column("reason", ["bad luck"])(pq.read_table(path)), path)
    assert set(found(dataset)) == {("checksum", str(path)), ("rows", str(path))}


def test_an_image_that_is_embedded_and_failed(dataset):
    path = dataset.layout.failures / dataset.layout.part_name(0)
    pq.write_table(with_column("id", ["02.jpg"])(pq.read_table(path)), path)
    part = dataset.layout.embeddings / path.name
    assert set(found(dataset)) == {("checksum", str(path)), ("rows", str(part))}


@pytest.mark.parametrize("name", ["part-00001.parquet.bak", "notes.txt", "part-00004.parquet",
                                  "part-0.parquet", ".hidden.parquet", "old"])  # fmt: skip
@pytest.mark.parametrize("folder", ["embeddings", "failures"])
def test_what_readers_of_a_folder_would_take_for_rows(folder, name, dataset):
    path = dataset.layout.root / folder / name
    path.mkdir() if name == "old" else path.write_bytes(b"")
    looked = verify(dataset)
    assert [(each.kind, each.path) for each in looked.problems] == [("foreign", str(path))]
    assert looked.bad_shards == [] and repair(dataset, looked) == [] and path.exists()


def test_what_readers_pass_over_is_no_problem(dataset):
    for name in (".DS_Store", "_SUCCESS", ".part-00000.parquet.crc"):
        (dataset.layout.embeddings / name).write_bytes(b"")
    assert found(dataset) == []
    assert dataset.embeddings.count_rows() == 15


def test_of_a_damaged_plan_each_file_is_named_once(dataset):
    plan = dataset.layout.plan / "plan-00000.parquet"
    table = pq.read_table(plan)
    os.truncate(plan, 100)
    assert found(dataset) == [("plan", str(plan))]
    plan.unlink()
    assert found(dataset) == [("plan", str(plan))]
    # Other rows in it are not what the parts are to blame for.
    pq.write_table(table.slice(1), plan, row_group_size=SHARD)
    looked = verify(dataset)
    assert {(each.kind, each.path) for each in looked.problems} >= {("plan", str(plan))}
    assert SHARDS - 1 not in looked.bad_shards


def test_an_id_that_is_listed_twice(dataset):
    plan = dataset.layout.plan / "plan-00000.parquet"
    table = pq.read_table(plan)
    ids = table["id"].to_pylist()
    pq.write_table(with_column("id", [*ids[:-1], ids[0]])(table), plan, row_group_size=SHARD)
    # As if it had been listed so: a source that does that is not known.
    file = replace(
        dataset.record.plan.files[0], sha256=hashlib.sha256(plan.read_bytes()).hexdigest()
    )
    listed = replace(dataset.record.plan, files=(file,))
    dataset.record = replace(dataset.record, plan=listed)
    dataset.record.save(dataset.layout)
    assert ("plan", str(dataset.layout.plan)) in found(dataset)


def test_a_store_that_is_out_of_reach_is_no_damage(dataset, monkeypatch):
    def unreachable(path):
        raise StoreError("s3://bucket: timed out")

    os.truncate(dataset.layout.embeddings / dataset.layout.part_name(0), 100)
    looked, before = verify(dataset), content(dataset.layout)
    assert looked.bad_shards == [0]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", unreachable)
        with pytest.raises(StoreError):
            verify(dataset)
        with pytest.raises(StoreError):
            repair(dataset, looked)
    assert content(dataset.layout) == before


def test_what_a_run_has_finished_meanwhile_is_not_thrown_away(dataset):
    layout = dataset.layout
    (layout.embeddings / layout.part_name(2)).unlink()
    (layout.embeddings / layout.part_name(3)).unlink()
    looked = verify(dataset)
    assert looked.bad_shards == [2, 3]
    do(layout, 2)
    assert repair(dataset, looked) == [3]
    assert layout.committed() == [0, 1, 2]


def test_nothing_is_repaired_while_another_writes(dataset):
    layout = dataset.layout
    os.truncate(layout.embeddings / layout.part_name(2), 100)
    with run_lock(layout), pytest.raises(ResfeatError, match=f"written by process {os.getpid()}"):
        repair(dataset, verify(dataset))
    assert len(layout.committed()) == SHARDS


def test_a_shard_that_was_being_replaced_is_unfinished_and_keeps_its_rows(dataset):
    layout = dataset.layout
    part = layout.embeddings / layout.part_name(0)
    note = Note.read(layout, 0)
    newer = {"embeddings": "0" * 64, "failures": None}
    replace(note, digests=newer, replaces=note.digests).write(layout, 0)
    assert found(dataset) == [("unfinished", str(part))]
    assert repair(dataset, verify(dataset)) == [] and len(kept_rows(layout, 0).rows) == 5
    assert dataset.commits().behind.keys() == {0} and 0 not in dataset.commits().done
    os.truncate(part, 100)
    assert set(found(dataset)) == {("checksum", str(part)), ("unreadable", str(part))}
    with pytest.raises(ResfeatError, match="verify --repair"):
        kept_rows(layout, 0)
    assert repair(dataset, verify(dataset)) == [0] and kept_rows(layout, 0).rows == {}


def test_a_repair_that_is_stopped_leaves_no_shard_without_its_failures(dataset, monkeypatch):
    """Embeddings go first: a shard that has them counts as done."""
    layout = dataset.layout
    os.truncate(layout.failures / layout.part_name(1), 100)
    looked, remove = verify(dataset), verification.remove

    class Killed(BaseException):
        pass

    for stop_at in range(2):
        calls = []

        def remove_and_stop(path, calls=calls, stop_at=stop_at):
            remove(path)
            calls.append(path)
            if len(calls) > stop_at:
                raise Killed

        monkeypatch.setattr(verification, "remove", remove_and_stop)
        with pytest.raises(Killed):
            repair(dataset, looked)
        assert 1 not in layout.committed()


def test_a_note_that_counts_other_rows_is_found(dataset):
    """Status and reports believe it."""
    layout = dataset.layout
    note = Note.read(layout, 1)
    for wrong in (
        replace(note, embedded=note.embedded + 1),
        replace(note, reasons={"corrupt": note.failed}),
    ):
        wrong.write(layout, 1)
        assert found(dataset) == [("checksum", str(layout.note(1)))]


def test_kept_rows_are_those_that_were_committed(dataset):
    layout = dataset.layout
    part = layout.embeddings / layout.part_name(0)
    table = pq.read_table(part)
    kept = kept_rows(layout, 0)
    assert list(kept.rows) == table["id"].to_pylist() and kept.table.equals(table)
    assert list(kept.rows.values()) == list(range(len(table)))
    assert kept_rows(layout, 2).rows == {}  # all of them failed
    layout.note(0).unlink()
    with pytest.raises(ResfeatError, match="not what was committed"):
        kept_rows(layout, 0)


FILES = st.tuples(
    st.sampled_from(["embeddings", "failures", "_resfeat/checksums"]), st.integers(0, SHARDS - 1)
)
HARM = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("remove"), st.just(0), st.just(0)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FILES, HARM, min_size=1, max_size=4))
def test_any_damage_is_found_in_its_shard_and_repaired(whole, damage):
    with TemporaryDirectory() as folder:
        shutil.copytree(whole.layout.root, Path(folder) / "out")
        dataset = open_dataset(Path(folder) / "out")
        layout, before = dataset.layout, content(whole.layout)
        good = [Note.read(whole.layout, shard) for shard in range(SHARDS)]
        for (place, shard), harm in damage.items():
            suffix = ".json" if place.endswith("checksums") else ".parquet"
            inflict(layout.root / place / f"part-{shard:05d}{suffix}", *harm)
        after = content(layout)
        changed = {path for path in before if before[path] != after.get(path)}
        looked = verify(dataset)
        # A checksum's file may have lost a space, or a number that nobody needs.
        hurt = {
            shard
            for path in changed
            for shard in [int(path.stem.rpartition("-")[2])]
            if path.suffix == ".parquet" or Note.read(layout, shard) != good[shard]
        }
        assert set(looked.bad_shards) == hurt
        assert {each.shard for each in looked.problems} == hurt

        # With neither embeddings nor a checksum it is as if the shard had never been done.
        there = {*layout.committed(), *layout.with_notes()}
        assert repair(dataset, looked) == sorted(hurt & there)
        assert layout.committed() == sorted(set(range(SHARDS)) - hurt)
        assert set(content(layout).items()) <= set(after.items())  # the others stay as they are
        for shard in looked.bad_shards:
            do(layout, shard)
        assert verify(dataset).problems == []
        mended = content(layout)
        assert [path for path in before if before[path] != mended[path]] == sorted(
            path for path in changed if int(path.stem.rpartition("-")[2]) not in hurt
        )


def inflict(path, kind, place, mask):
    if not path.exists():
        return
    data = bytearray(path.read_bytes())
    place = int(place * len(data))
    if kind == "remove":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[:place])
    else:
        data[place] ^= mask
        path.write_bytes(data)
