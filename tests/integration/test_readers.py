"""The dataset as it stands, in the readers that people use."""

import numpy as np
import pyarrow.dataset as ds
import pytest
from later import Later
from tables import rows, vectors

import resfeat
from resfeat.dataset.verify import verify

datasets = Later("datasets")
duckdb = Later("duckdb")
pd = Later("pandas")
pl = Later("polars")


@pytest.fixture(scope="module")
def expected(inline):
    table = rows(inline)
    return table["id"].to_pylist(), vectors(table), table["label"].to_pylist()


def check(expected, ids, embeddings, labels):
    order = np.argsort(np.array(ids, dtype=object))
    given = np.stack([np.asarray(embedding, dtype=np.float32) for embedding in embeddings])
    assert [ids[i] for i in order] == expected[0]
    assert np.array_equal(given[order], expected[1])
    assert [labels[i] for i in order] == expected[2]


def test_pyarrow(inline, expected):
    table = ds.dataset(inline / "embeddings").to_table()
    check(expected, *(table[name].to_pylist() for name in ("id", "embedding", "label")))


def test_pandas(inline, expected):
    frame = pd.read_parquet(inline / "embeddings")
    check(expected, *(frame[name].tolist() for name in ("id", "embedding", "label")))
    assert str(frame["mtime"].dtype).startswith("datetime64")


def test_polars(inline, expected):
    frame = pl.read_parquet(inline / "embeddings" / "*.parquet")
    check(expected, *(frame[name].to_list() for name in ("id", "embedding", "label")))
    lazy = pl.scan_parquet(inline / "embeddings").filter(pl.col("width") > 100)
    assert lazy.select(pl.len()).collect().item() == (frame["width"] > 100).sum()


def test_duckdb(inline, expected):
    query = f"select id, embedding, label from '{inline}/embeddings/*.parquet'"
    check(expected, *zip(*duckdb.sql(query).fetchall(), strict=True))
    joined = f"""
        select count(*) from '{inline}/embeddings/*.parquet' e
        join '{inline}/failures/*.parquet' f using (id)"""
    assert duckdb.sql(joined).fetchall() == [(0,)]


def test_hugging_face_takes_the_folder_itself(inline, expected, tmp_path):
    """By its card: without it, the plan and the failures would pass for rows."""
    loaded = datasets.load_dataset(str(inline), cache_dir=str(tmp_path))
    rows = loaded["train"].to_dict()
    check(expected, *(rows[name] for name in ("id", "embedding", "label")))
    card = (inline / "README.md").read_text()
    for told in ("resnet18", "| `label` | string |", "| `reason` | string |", "resfeat search"):
        assert told in card
    assert resfeat.open_dataset(inline).record.identity.fingerprint in card


def test_our_own_reader(inline, expected):
    dataset = resfeat.open_dataset(inline)
    assert dataset.commits().embedded == 500
    assert sum(dataset.commits().reasons.values()) == 12
    assert verify(dataset).problems == []
    assert dataset.embeddings.count_rows() == 500
    assert dataset.failures.count_rows() == 12
    batches = list(dataset.vectors(rows=100))
    ids = [name for batch, _ in batches for name in batch.to_pylist()]
    embeddings = np.concatenate([block for _, block in batches])
    check(expected, ids, list(embeddings), [expected[2][0]] * len(ids))
