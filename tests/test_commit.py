"""Committing a shard: whole or not at all, replaced in one step, exactly the plan's rows."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import add

from resfeat.backbones.weights import resolve
from resfeat.dataset import (
    Commits,
    FailedItem,
    Layout,
    Part,
    Row,
    embeddings_schema,
    kept_rows,
)
from resfeat.dataset import commit as commits
from resfeat.dataset.commit import ROW_GROUP, digest
from resfeat.dataset.notes import Note
from resfeat.errors import Failure, ResfeatError, StoreError
from resfeat.plan import Plan
from resfeat.spec import FeatureSpec, Identity
from resfeat.storage import draft


@pytest.fixture(scope="module")
def identity():
    return resolve(FeatureSpec(model="resnet18", weights="random:0")).identity


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path)
    for folder in layout.folders:
        folder.mkdir(parents=True)
    return layout


def commits_of(layout):
    return Commits.of(layout, Plan(4, ()))


def rows(*ids):
    return [Row(name, 640, 480, 1000, 1_700_000_000_123_456, "cats") for name in ids]


def vectors(count):
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


FAILED = FailedItem("z.jpg", "file:///z.jpg", Failure("decode", "truncated", "cut off"))


def test_rows_come_back_as_they_were(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    with Part(layout, 7, schema) as part:
        add(part, rows("a.jpg"), vectors(1), [FAILED])
        add(part, rows("b.jpg", "c.jpg"), vectors(2))
        part.commit(["a.jpg", "b.jpg", "c.jpg", "z.jpg"])
    table = pq.read_table(layout.embeddings / "part-00007.parquet")
    assert table.schema.equals(schema, check_metadata=True)
    assert table["id"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]
    expected = np.concatenate([vectors(1), vectors(2)])
    given = table["embedding"].combine_chunks().flatten().to_numpy().reshape(3, 4)
    assert np.array_equal(given, expected)
    assert table.to_pylist()[0]["mtime"].timestamp() == pytest.approx(1_700_000_000.123456)
    assert table.to_pylist()[0]["label"] == "cats"
    told = json.loads(table.schema.metadata[b"resfeat"])
    assert told.pop("fingerprint") == identity.fingerprint
    assert Identity.from_dict(told) == identity
    (failure,) = pq.read_table(layout.failures / "part-00007.parquet").to_pylist()
    assert failure == {
        "id": "z.jpg",
        "uri": "file:///z.jpg",
        "stage": "decode",
        "reason": "truncated",
        "message": "cut off",
    }
    assert not list(layout.tmp.iterdir())


def test_an_exception_leaves_nothing(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=False)
    with pytest.raises(ZeroDivisionError), Part(layout, 0, schema) as part:
        add(part, rows("a.jpg"), vectors(1), [FAILED])
        raise ZeroDivisionError
    assert not layout.committed()
    assert not layout.with_failures()
    assert not list(layout.tmp.iterdir())


@pytest.mark.parametrize("planned", [["a.jpg"], ["a.jpg", "b.jpg", "c.jpg"], ["a.jpg", "c.jpg"]])
def test_rows_that_are_not_the_plans_are_never_committed(planned, layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=False)
    refused = pytest.raises(ResfeatError, match="do not match the plan")
    with refused, Part(layout, 0, schema) as part:
        add(part, rows("a.jpg", "b.jpg"), vectors(2))
        part.commit(planned)
    assert not layout.committed()
    assert not list(layout.tmp.iterdir())


@pytest.fixture
def stop_at(monkeypatch):
    """Make a commit end at a step, as if its process had been killed there."""

    class Killed(BaseException):
        pass

    def stop(at, commit):
        def on_step(step):
            if step == at:
                raise Killed

        monkeypatch.setattr(commits, "on_step", on_step)
        with pytest.raises(Killed):
            commit()
        monkeypatch.setattr(commits, "on_step", lambda step: None)

    return stop


def test_the_steps_of_a_commit_are_those_that_are_named(layout, identity, monkeypatch):
    seen = []
    monkeypatch.setattr(commits, "on_step", seen.append)
    commit(layout, identity, ["a.jpg"], [FAILED])
    assert seen == [step for step in commits.STEPS if step != "settled"]
    seen.clear()
    commit(layout, identity, ["a.jpg", "z.jpg"], [])  # this time the second one could be read
    # What was an embedding stays one: the embeddings are replaced first.
    assert seen == ["written", "checked", "noted", "embeddings", "failures", "settled"]
    assert set(seen) == set(commits.STEPS)
    seen.clear()
    commit(layout, identity, ["a.jpg", "z.jpg"], [])  # a twin that comes late
    assert seen == ["written", "checked"]


def test_two_that_write_one_part_do_not_write_one_draft(tmp_path):
    """A worker that is thought dead, and its successor."""
    drafts = [draft(tmp_path, "part-00000.parquet") for _ in range(2)]
    for number, each in enumerate(drafts):
        each.sink.write_bytes(bytes([number]) * 10)
    for number, each in enumerate(drafts):
        each.publish(tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == bytes([number]) * 10


@pytest.mark.parametrize("step", [step for step in commits.STEPS if step != "settled"])
def test_a_new_shard_is_visible_whole_or_not_at_all(step, layout, identity, stop_at):
    stop_at(step, lambda: commit(layout, identity, ["a.jpg"], [FAILED]))
    assert layout.committed() == ([0] if step == "embeddings" else [])
    assert list(commits_of(layout).done) == layout.committed()
    assert layout.with_failures() == ([0] if step in ("failures", "embeddings") else [])
    if layout.committed():
        assert ids(layout) == ["a.jpg"] and ids(layout, "failures") == ["z.jpg"]
    commit(layout, identity, ["a.jpg"], [FAILED])
    assert ids(layout) == ["a.jpg"] and ids(layout, "failures") == ["z.jpg"]
    assert commits_of(layout).done[0].reasons == {"truncated": 1}


@pytest.mark.parametrize("again", commits.STEPS)
@pytest.mark.parametrize("step", commits.STEPS)
def test_a_shard_that_is_replaced_is_never_missing_and_loses_no_row(
    step, again, layout, identity, stop_at
):
    """Killed while it was replaced, and once more in the attempt that followed."""
    late = replace(FAILED, id="y.jpg")
    commit(layout, identity, ["a.jpg"], [FAILED, late])

    def is_sound():
        assert ids(layout)[0] == "a.jpg" and "a.jpg" in kept_rows(layout, 0).rows
        every = set(ids(layout)) | set(ids(layout, "failures"))
        assert every == {"a.jpg", "y.jpg", "z.jpg"}
        assert len(ids(layout)) == len(set(ids(layout)))
        # Done: all of it is as the note says. Half: the next run does it again.
        done = commits_of(layout)
        assert (0 in done.done) != (0 in done.behind)
        note = Note.read(layout, 0)
        for kind in note.digests:
            found = digest(layout.root / kind / layout.part_name(0))
            assert found in (note.allows(kind) if note.replaces else {note.digests[kind]})
        assert (0 in done.done) == (note.replaces is None)

    stop_at(step, lambda: commit(layout, identity, ["a.jpg", "z.jpg"], [late]))
    is_sound()
    # The second attempt finds the other one mended, too.
    stop_at(again, lambda: commit(layout, identity, ["a.jpg", "y.jpg", "z.jpg"], []))
    is_sound()
    commit(layout, identity, ["a.jpg", "y.jpg", "z.jpg"], [])
    assert ids(layout) == ["a.jpg", "y.jpg", "z.jpg"] and not layout.with_failures()
    assert commits_of(layout).done[0].embedded == 3


def test_what_a_replacement_left_is_of_its_own_generation_however_often_it_was_killed(
    layout, identity, stop_at
):
    """The rows that are there are those of before, and a failure that may be old is tried again."""
    commit(layout, identity, ["a.jpg"], [FAILED])

    def anew():
        schema = embeddings_schema(identity, {"avgpool": 4}, with_label=False)
        with Part(layout, 0, schema, generation=1) as part:
            add(part, [replace(row, label=None) for row in rows("a.jpg")], vectors(1) + 1)
            add(part, [], vectors(0), [replace(FAILED, failure=Failure("decode", "corrupt", ""))])
            part.commit(["a.jpg", "z.jpg"])

    for _ in range(2):
        stop_at("noted", anew)
        assert kept_rows(layout, 0).generation == 0
    stop_at("embeddings", anew)
    kept = kept_rows(layout, 0)
    assert (kept.generation, kept.rows.keys(), kept.failures) == (1, {"a.jpg"}, {})
    anew()
    assert kept_rows(layout, 0).failures["z.jpg"].failure.reason == "corrupt"


@pytest.mark.parametrize("is_done", [True, False])
def test_a_change_of_failures_of_which_the_answer_is_an_error(
    is_done, layout, identity, monkeypatch
):
    """It may have come about all the same: the shard is to be done again, and has all its rows."""
    commit(layout, identity, ["a.jpg"], [FAILED])
    remove = commits.remove

    def remove_and_fail(location):
        if is_done:
            remove(location)
        raise StoreError("no answer")

    monkeypatch.setattr(commits, "remove", remove_and_fail)
    with pytest.raises(StoreError, match="no answer"):
        commit(layout, identity, ["a.jpg", "z.jpg"], [])
    assert commits_of(layout).behind.keys() == {0}
    assert list(kept_rows(layout, 0).rows) == ["a.jpg", "z.jpg"]
    monkeypatch.setattr(commits, "remove", remove)
    commit(layout, identity, ["a.jpg", "z.jpg"], [])
    assert ids(layout) == ["a.jpg", "z.jpg"] and not layout.with_failures()


def test_an_id_that_comes_twice_is_never_committed(layout, identity):
    """Not even where the plan has it, too, once."""
    with pytest.raises(ResfeatError, match="do not match the plan"):
        commit(layout, identity, ["a.jpg", "a.jpg"], [], planned=["a.jpg"])
    with pytest.raises(ResfeatError, match="do not match the plan"):
        commit(layout, identity, ["z.jpg"], [FAILED], planned=["z.jpg"])
    assert not layout.committed()


def test_what_is_carried_stands_in_both_tables(layout, identity):
    carried = (pa.field("price", pa.int8()), pa.field("tags", pa.list_(pa.string())))
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True, carried=carried)
    good = replace(rows("a.jpg")[0], carried=(3, ["new"]))
    with Part(layout, 0, schema) as part:
        add(part, [good], vectors(1), [replace(FAILED, carried=(None, []))])
        part.commit(["a.jpg", "z.jpg"])
    table = pq.read_table(layout.embeddings / "part-00000.parquet")
    assert table.schema.names[-3:] == ["label", "price", "tags"]
    assert table.schema.field("price").type == pa.int8()
    assert [table[name][0].as_py() for name in ("price", "tags")] == [3, ["new"]]
    (failure,) = pq.read_table(layout.failures / "part-00000.parquet").to_pylist()
    assert (failure["reason"], failure["price"], failure["tags"]) == ("truncated", None, [])
    assert kept_rows(layout, 0).table.equals(table)


def test_embeddings_are_written_for_those_who_read_them_whole(layout, identity):
    """Neither compressed nor described: both cost time, and tell nobody anything."""
    commit(layout, identity, ["a.jpg", "b.jpg"], [])
    meta = pq.read_metadata(layout.embeddings / "part-00000.parquet").row_group(0)
    columns = {meta.column(n).path_in_schema: meta.column(n) for n in range(meta.num_columns)}
    vector = columns.pop("embedding.list.element")
    assert (vector.compression, vector.statistics) == ("UNCOMPRESSED", None)
    assert {each.compression for each in columns.values()} == {"ZSTD"}
    assert columns["id"].statistics.max == "b.jpg"


def test_rows_that_are_kept_are_the_rows_that_were_committed(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    with Part(layout, 0, schema) as part:
        add(part, rows("a.jpg", "b.jpg"), vectors(2))
        part.commit(["a.jpg", "b.jpg"])
    kept = kept_rows(layout, 0)
    assert kept.rows == {"a.jpg": 0, "b.jpg": 1}
    assert kept.table.equals(pq.read_table(layout.embeddings / "part-00000.parquet"))
    assert kept.table["embedding"].to_pylist() == vectors(2).tolist()
    assert kept_rows(layout, 1).rows == {}


def test_rows_that_are_kept_stand_between_those_that_are_added(layout, identity):
    """As they were, and in groups that are neither much smaller nor larger than usual ones."""
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    many = [f"{n:04d}.jpg" for n in range(4000)]
    with Part(layout, 0, schema) as part:
        add(part, rows(*many), vectors(4000))
        part.commit(many)
    kept = kept_rows(layout, 0).table
    new, again = rows("new.jpg"), replace(FAILED, id="again.jpg")
    with Part(layout, 0, schema, generation=1) as part:
        part.keep(kept.take([2, 0]), [again])
        add(part, new, vectors(1))
        part.keep(kept.slice(10), [])
        part.commit([*many[10:], many[0], many[2], "new.jpg", "again.jpg"])
    path = layout.embeddings / "part-00000.parquet"
    table, file = pq.read_table(path), pq.ParquetFile(path)
    assert table["id"].to_pylist() == [many[2], many[0], "new.jpg", *many[10:]]
    assert table.slice(3).equals(kept.slice(10)) and table.slice(0, 2).equals(kept.take([2, 0]))
    assert ids(layout, "failures") == ["again.jpg"]
    assert kept_rows(layout, 0).generation == 1
    groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert all(ROW_GROUP <= size < 2 * ROW_GROUP for size in groups[:-1]), groups


def commit(layout, identity, embedded, failed, planned=None):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=False)
    with Part(layout, 0, schema) as part:
        add(part, [replace(row, label=None) for row in rows(*embedded)], vectors(len(embedded)))
        add(part, [], vectors(0), failed)
        part.commit(planned or [*embedded, *(item.id for item in failed)])


def ids(layout, folder="embeddings"):
    part = layout.root / folder / "part-00000.parquet"
    return pq.read_table(part)["id"].to_pylist() if part.exists() else []


def test_a_second_attempt_writes_the_same_bytes(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    seen = set()
    for _ in range(2):
        with Part(layout, 0, schema) as part:
            add(part, rows("a.jpg", "b.jpg"), vectors(2))
            part.commit(["a.jpg", "b.jpg"])
        seen.add((layout.embeddings / "part-00000.parquet").read_bytes())
    assert len(seen) == 1
