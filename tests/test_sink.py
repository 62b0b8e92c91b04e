"""Committing a shard: whole or not at all, failures first, exactly the plan's rows."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from resfeat import sink
from resfeat.backbones.weights import resolve
from resfeat.errors import Failure, ResfeatError
from resfeat.layout import Layout
from resfeat.sink import FailedItem, Part, Row, embeddings_schema
from resfeat.spec import FeatureSpec, Identity


@pytest.fixture(scope="module")
def identity():
    return resolve(FeatureSpec(model="resnet18", weights="random:0")).identity


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path)
    for folder in (layout.embeddings, layout.tmp):
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


def test_failures_are_visible_before_the_commit_and_stale_ones_go(layout, identity, monkeypatch):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=False)
    renamed = []

    def dies_before_the_embeddings(temporary, target):
        renamed.append(target)
        if target.parent == layout.embeddings:
            raise KeyboardInterrupt
        publish(temporary, target)

    publish = sink.publish
    monkeypatch.setattr(sink, "publish", dies_before_the_embeddings)
    with pytest.raises(KeyboardInterrupt), Part(layout, 0, schema) as part:
        part.add(rows("a.jpg"), vectors(1), [FAILED])
        part.commit(["a.jpg", "z.jpg"])
    assert renamed == [
        layout.failures / "part-00000.parquet",
        layout.embeddings / "part-00000.parquet",
    ]
    assert layout.with_failures() == [0] and not layout.committed()

    monkeypatch.setattr(sink, "publish", publish)
    with Part(layout, 0, schema) as part:  # this time the second image could be read
        part.add(rows("a.jpg", "z.jpg"), vectors(2))
        part.commit(["a.jpg", "z.jpg"])
    assert layout.committed() == [0] and not layout.with_failures()


def test_a_second_attempt_writes_the_same_bytes(layout, identity):
    schema = embeddings_schema(identity, {"avgpool": 4}, with_label=True)
    seen = set()
    for _ in range(2):
        with Part(layout, 0, schema) as part:
            part.add(rows("a.jpg", "b.jpg"), vectors(2))
            part.commit(["a.jpg", "b.jpg"])
        seen.add((layout.embeddings / "part-00000.parquet").read_bytes())
    assert len(seen) == 1
