"""Committing a shard: whole or not at all, failures first, exactly the plan's rows."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from resfeat.backbones.weights import resolve
from resfeat.dataset import FailedItem, Layout, Part, Row, embeddings_schema
from resfeat.dataset import commit as sink
from resfeat.errors import Failure, ResfeatError
from resfeat.spec import FeatureSpec, Identity


@pytest.fixture(scope="module")
def identity():
    return resolve(FeatureSpec(model="resnet18", weights="random:0")).identity


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path)
    for folder in layout.folders:
        folder.mkdir(parents=True)
    return layout


def rows(*ids):
    return [Row(name, 640, 480, 1000, 1_700_000_000_123_456, "cats") for name in ids]


def vectors(count):
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


FAILED = FailedItem("z.jpg", "file:///z.jpg", Failure("decode", "truncated", "cut off"))


def test_rows_come_back_as_they_were(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    with Part(layout, 7, schema) as part:
        part.add(rows("a.jpg"), vectors(1), [FAILED])
        part.add(rows("b.jpg", "c.jpg"), vectors(2))
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
        part.add(rows("a.jpg"), vectors(1), [FAILED])
        raise ZeroDivisionError
    assert not layout.committed()
    assert not layout.with_failures()
    assert not list(layout.tmp.iterdir())


@pytest.mark.parametrize("planned", [["a.jpg"], ["a.jpg", "b.jpg", "c.jpg"], ["a.jpg", "c.jpg"]])
def test_rows_that_are_not_the_plans_are_never_committed(planned, layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=False)
    refused = pytest.raises(ResfeatError, match="do not match the plan")
    with refused, Part(layout, 0, schema) as part:
        part.add(rows("a.jpg", "b.jpg"), vectors(2))
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

        monkeypatch.setattr(sink, "on_step", on_step)
        with pytest.raises(Killed):
            commit()
        monkeypatch.setattr(sink, "on_step", lambda step: None)

    return stop


def test_the_steps_of_a_commit_are_those_that_are_named(layout, identity, monkeypatch):
    seen = []
    monkeypatch.setattr(sink, "on_step", seen.append)
    commit(layout, identity, ["a.jpg"], [FAILED])
    usual = [step for step in sink.STEPS if step not in ("withdrawn", "tidied")]
    assert seen == usual
    seen.clear()
    commit(layout, identity, ["a.jpg", "z.jpg"], [])  # this time the second one could be read
    assert seen == list(sink.STEPS)
    seen.clear()
    commit(layout, identity, ["a.jpg", "z.jpg"], [])  # a twin that comes late
    assert seen == ["written", "checked"]


@pytest.mark.parametrize("step", sink.STEPS)
def test_a_shard_is_visible_whole_or_not_at_all(step, layout, identity, stop_at):
    if step not in ("withdrawn", "tidied"):
        stop_at(step, lambda: commit(layout, identity, ["a.jpg"], [FAILED]))
        assert layout.committed() == ([0] if step == "embeddings" else [])
        assert layout.with_failures() == ([] if step in ("written", "checked") else [0])
        if layout.committed():
            assert ids(layout) == ["a.jpg"] and ids(layout, "failures") == ["z.jpg"]
    commit(layout, identity, ["a.jpg"], [FAILED])
    assert ids(layout) == ["a.jpg"] and ids(layout, "failures") == ["z.jpg"]

    # Once more, and what failed can be read: never in both folders, and nothing is lost.
    stop_at(step, lambda: commit(layout, identity, ["a.jpg", "z.jpg"], []))
    if layout.committed():
        assert sorted([*ids(layout), *ids(layout, "failures")]) == ["a.jpg", "z.jpg"]
    assert "a.jpg" in sink.kept_rows(layout, 0)
    commit(layout, identity, ["a.jpg", "z.jpg"], [])
    assert ids(layout) == ["a.jpg", "z.jpg"] and not layout.with_failures()


@pytest.mark.parametrize("is_done", [True, False])
def test_a_change_of_failures_of_which_the_answer_is_an_error(
    is_done, layout, identity, monkeypatch
):
    """It may have come about all the same: then the old embeddings would be one image short."""
    commit(layout, identity, ["a.jpg"], [FAILED])
    remove = sink.remove

    def remove_and_fail(location):
        if is_done:
            remove(location)
        raise OSError("no answer")

    monkeypatch.setattr(sink, "remove", remove_and_fail)
    with pytest.raises(OSError, match="no answer"):
        commit(layout, identity, ["a.jpg", "z.jpg"], [])
    if is_done:
        assert not layout.committed()
    else:
        assert ids(layout) == ["a.jpg"] and ids(layout, "failures") == ["z.jpg"]
    assert "a.jpg" in sink.kept_rows(layout, 0)
    monkeypatch.setattr(sink, "remove", remove)
    commit(layout, identity, ["a.jpg", "z.jpg"], [])
    assert ids(layout) == ["a.jpg", "z.jpg"] and not layout.with_failures()


def test_rows_that_are_kept_are_the_rows_that_were_committed(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    with Part(layout, 0, schema) as part:
        part.add(rows("a.jpg", "b.jpg"), vectors(2))
        part.commit(["a.jpg", "b.jpg"])
    kept = sink.kept_rows(layout, 0)
    assert [row for row, _ in kept.values()] == rows("a.jpg", "b.jpg")
    assert np.array_equal(np.stack([vector for _, vector in kept.values()]), vectors(2))
    assert sink.kept_rows(layout, 1) == {}


def commit(layout, identity, embedded, failed):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=False)
    with Part(layout, 0, schema) as part:
        part.add([replace(row, label=None) for row in rows(*embedded)], vectors(len(embedded)))
        part.add([], vectors(0), failed)
        part.commit([*embedded, *(item.id for item in failed)])


def ids(layout, folder="embeddings"):
    part = layout.root / folder / "part-00000.parquet"
    return pq.read_table(part)["id"].to_pylist() if part.exists() else []


def test_a_second_attempt_writes_the_same_bytes(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    seen = set()
    for _ in range(2):
        with Part(layout, 0, schema) as part:
            part.add(rows("a.jpg", "b.jpg"), vectors(2))
            part.commit(["a.jpg", "b.jpg"])
        seen.add((layout.embeddings / "part-00000.parquet").read_bytes())
    assert len(seen) == 1
