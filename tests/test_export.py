"""Exports: each form read by its own library, whole or not at all, in bounded memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import error_of
from later import Later
from object_store import ObjectStore
from pictured import FEW, MANY, invent, invented
from small import embed, write_pictures
from tables import rows

from resfeat import open_dataset
from resfeat.downstream import export as module
from resfeat.downstream.index import write_index

pd = Later("pandas")

FORMS = ("npy", "clip", "faiss", "lance")


@pytest.fixture(scope="module")
def large(once):
    """20,000 rows, in several parts. Not to be changed."""
    return invented(once, FEW)


@pytest.fixture(scope="module")
def dataset(once):
    """A small one with labels, in several parts. Not to be changed."""

    def write(folder):
        embed(folder / "out", folder_of(folder), label_from="parent", shard_size=4)

    def folder_of(folder):
        write_pictures(folder / "in")
        return folder / "in"

    return once("exported", write) / "out"


@pytest.fixture
def expected(dataset):
    """Ids in the order of the plan, and their vectors."""
    ids, blocks = zip(*open_dataset(dataset).vectors(), strict=True)
    return [name for some in ids for name in some.to_pylist()], np.concatenate(blocks)


def done(resfeat, *arguments):
    told = resfeat("export", *arguments)
    assert told.returncode == 0, told.stderr
    return told


def unit(given):
    return given / np.linalg.norm(given, axis=1, keepdims=True)


def test_npy(dataset, expected, resfeat, tmp_path):
    told = done(resfeat, dataset, "--to", "npy", tmp_path / "x")
    assert told.stdout == f"Exported 9 rows to {tmp_path}/x\n"
    given = np.load(tmp_path / "x" / "embeddings.npy", mmap_mode="r")
    assert given.dtype == np.float32 and np.array_equal(given, expected[1])
    columns = pq.read_table(tmp_path / "x" / "ids.parquet")
    assert columns["id"].to_pylist() == expected[0]
    table = rows(dataset).drop_columns("embedding")
    assert columns.sort_by("id").to_pylist() == table.to_pylist()
    fingerprint = open_dataset(dataset).record.identity.fingerprint
    assert json.loads(columns.schema.metadata[b"resfeat"])["fingerprint"] == fingerprint
    assert sorted(os.listdir(tmp_path / "x")) == ["embeddings.npy", "ids.parquet"]


@pytest.mark.parametrize("most", [1_000_000, 4, 3])
def test_the_folder_of_clip_retrieval(dataset, expected, resfeat, tmp_path, monkeypatch, most):
    """Read as clip-retrieval and autofaiss do: the files of a folder by their names' order. They
    are cut where they are full, wherever parts begin and end."""
    monkeypatch.setattr(module, "FILE_ROWS", most)
    done(resfeat, dataset, "--to", "clip", tmp_path / "x")
    arrays = sorted((tmp_path / "x" / "img_emb").iterdir())
    tables = sorted((tmp_path / "x" / "metadata").iterdir())
    count = -(-9 // most)
    assert [path.name for path in arrays] == [f"img_emb_{n}.npy" for n in range(count)]
    assert [path.name for path in tables] == [f"metadata_{n}.parquet" for n in range(count)]
    each = [np.load(path) for path in arrays]
    frames = [pd.read_parquet(path) for path in tables]
    assert [len(some) for some in each] == [len(frame) for frame in frames]
    assert np.allclose(np.concatenate(each), unit(expected[1]), atol=1e-6)
    assert pd.concat(frames)["image_path"].tolist() == expected[0]
    assert set(pd.concat(frames)["label"]) == {"a", "b b"}


def test_faiss_opens_its_index_without_us(dataset, expected, resfeat, tmp_path):
    faiss = pytest.importorskip("faiss")
    done(resfeat, dataset, "--to", "faiss", tmp_path / "x")
    index = faiss.read_index(str(tmp_path / "x" / "index.faiss"))
    ids = pq.read_table(tmp_path / "x" / "ids.parquet")["id"].to_pylist()
    assert ids == expected[0] and index.ntotal == 9
    cosines, places = index.search(unit(expected[1]), 9)
    assert np.array_equal(places[:, 0], np.arange(9))
    true = np.sort(unit(expected[1]) @ unit(expected[1]).T, axis=1)[:, ::-1]
    assert np.allclose(cosines, true, atol=1e-5)


def test_an_index_that_memory_does_not_hold_is_refused(dataset, resfeat, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "memory_bytes", lambda: 4000)
    told = resfeat("export", dataset, "--to", "faiss", tmp_path / "x")
    assert told.returncode == 2 and "give --to npy" in error_of(told.stderr)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_index(dataset, resfeat, tmp_path, monkeypatch):
    """FAISS's own way to write a small one says nothing of it."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(module, "write_index", lambda index, path: write_index(index, "/dev/full"))
    told = resfeat("export", dataset, "--to", "faiss", tmp_path / "x")
    assert told.returncode == 1 and "give another DEST" in error_of(told.stderr)
    assert os.listdir(tmp_path) == []


def test_lance(dataset, resfeat, tmp_path):
    lance = pytest.importorskip("lance")
    done(resfeat, dataset, "--to", "lance", tmp_path / "x.lance")
    table = lance.dataset(str(tmp_path / "x.lance")).to_table().sort_by("id")
    assert table.select(rows(dataset).column_names).to_pylist() == rows(dataset).to_pylist()


@pytest.fixture(scope="module")
def layered(once):
    """Two layers, as float16."""

    def write(folder):
        write_pictures(folder / "in")
        layers = {"layers": ("layer2", "avgpool"), "dtype": "float16"}
        embed(folder / "out", folder / "in", **layers)

    return once("exported-layers", write) / "out"


def test_a_layer_and_what_is_stored_as_float16(layered, resfeat, tmp_path):
    done(resfeat, layered, "--to", "npy", tmp_path / "last")
    done(resfeat, layered, "--to", "npy", tmp_path / "one", "--layer", "layer2")
    table = pq.ParquetDataset(layered / "embeddings").read()
    for name, column in (("last", "embedding_avgpool"), ("one", "embedding_layer2")):
        given = np.load(tmp_path / name / "embeddings.npy")
        assert given.dtype == np.float16
        stored = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        assert np.array_equal(given, stored.reshape(given.shape))
        names = pq.read_schema(tmp_path / name / "ids.parquet").names
        assert not any(each.startswith("embedding") for each in names)
    done(resfeat, layered, "--to", "clip", tmp_path / "clip")
    given = np.load(tmp_path / "clip" / "img_emb" / "img_emb_0.npy")
    lengths = np.linalg.norm(given.astype(np.float32), axis=1)
    assert given.dtype == np.float16 and np.allclose(lengths, 1, atol=2e-3)


def test_a_dataset_in_a_store(dataset, expected, resfeat, tmp_path):
    with ObjectStore() as store:
        bucket = store.files("bucket")
        for path in dataset.rglob("*"):
            if path.is_file():
                with bucket.open_output_stream(f"out/{path.relative_to(dataset)}") as file:
                    file.write(path.read_bytes())
        told = resfeat("export", "s3://bucket/out", "--to", "npy", tmp_path / "x",
                       env=store.environment)  # fmt: skip
        assert told.returncode == 0, told.stderr
        assert np.array_equal(np.load(tmp_path / "x" / "embeddings.npy"), expected[1])
        refused = resfeat("export", dataset, "--to", "npy", "s3://bucket/x", env=store.environment)
        assert refused.returncode == 2 and "copy the folder there" in error_of(refused.stderr)


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(form, dataset, resfeat, tmp_path):
    def refused(*arguments, code=2):
        told = resfeat("export", *arguments, "--to", form)
        assert told.returncode == code and told.stdout == ""
        return error_of(told.stderr)

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is there already" in refused(dataset, tmp_path / "there")
    assert "is there already" in refused(dataset, tmp_path / "link")
    assert "there is no folder" in refused(dataset, tmp_path / "no" / "x")
    assert "no resfeat dataset" in refused(tmp_path, tmp_path / "x")
    assert "has no layer 'x'" in refused(dataset, tmp_path / "x", "--layer", "x")
    shutil.copytree(dataset, tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "embeddings")
    assert "has no embeddings yet" in refused(tmp_path / "begun", tmp_path / "x")
    shutil.copytree(dataset, tmp_path / "damaged")
    part = tmp_path / "damaged" / "embeddings" / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    content[4:200] = bytes(196)  # the end, which tells how many rows there are, is whole
    part.write_bytes(content)
    assert "verify --repair" in refused(tmp_path / "damaged", tmp_path / "x", code=1)
    assert (tmp_path / "there" / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["begun", "damaged", "link", "there"]


@pytest.mark.parametrize("form", ["npy", "clip"])
def test_a_part_that_is_replaced_meanwhile_is_noticed(form, dataset, tmp_path, monkeypatch):
    """By one with fewer rows, after the rows were counted."""
    shutil.copytree(dataset, tmp_path / "out")
    part = tmp_path / "out" / "embeddings" / "part-00001.parquet"
    write = getattr(module, f"_{form}")

    def replaced(rows, folder):
        pq.write_table(pq.read_table(part).slice(1), part)
        write(rows, folder)

    monkeypatch.setattr(module, f"_{form}", replaced)
    with pytest.raises(module.ResfeatError, match="was changed while it was read: export again"):
        module.export(open_dataset(tmp_path / "out"), form, str(tmp_path / "x"))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("form", "library"), [("faiss", "faiss"), ("lance", "lance")])
def test_a_missing_extra_is_one_line(form, library, dataset, resfeat, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    told = resfeat("export", dataset, "--to", form, tmp_path / "x")
    assert told.returncode == 2
    assert f"pip install 'resfeat[{form}]'" in error_of(told.stderr)
    assert os.listdir(tmp_path) == []


def test_more_than_ten_files_keep_their_order(large, resfeat, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_ROWS", 1_500)
    done(resfeat, large, "--to", "clip", tmp_path / "x")
    for folder, name in (("img_emb", "img_emb_{:02}.npy"), ("metadata", "metadata_{:02}.parquet")):
        names = sorted(path.name for path in (tmp_path / "x" / folder).iterdir())
        assert names == [name.format(n) for n in range(14)]
    last = np.load(tmp_path / "x" / "img_emb" / "img_emb_13.npy")
    assert last.shape == (19_980 - 13 * 1_500, 64)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.more)]
)
def test_a_signal_leaves_nothing(number, large, tmp_path):
    words = ["export", str(large), str(tmp_path / "x"), "--to", "npy"]
    slow = f"""
import sys, time
from resfeat.downstream import export
given = export._Rows.batches
def batches(self, columns):
    for batch in given(self, columns):
        time.sleep(0.5)
        yield batch
export._Rows.batches = batches
from resfeat.cli import main
main({words!r})
"""
    program = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob(".x.*/embeddings.npy")):
            assert program.poll() is None
            time.sleep(0.02)
        program.send_signal(number)
        told = program.communicate(timeout=30)[1]
    finally:
        program.kill()
    assert program.returncode == 128 + number
    assert "stopped: nothing was written" in told
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["npy", "clip"])
def test_few_rows_are_in_memory_at_a_time(form, large, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 512)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    tracemalloc.start()
    pa.set_memory_pool(pool)
    try:
        module.export(open_dataset(large), form, str(tmp_path / "x"))
        most = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        pa.set_memory_pool(before)
        tracemalloc.stop()
    assert most < 19_980 * 64 * 4 / 2


@pytest.mark.more
def test_memory_does_not_grow_with_the_rows(once, tmp_path):
    """51 MB of vectors: an export that held them, or twice them, would show."""
    measure = """
import resource, sys
from resfeat import open_dataset
from resfeat.downstream.export import export
dataset = open_dataset(sys.argv[1])
export(dataset, "npy", sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(open_dataset(sys.argv[3]), "npy", sys.argv[4])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    small = tmp_path / "small"
    invent(small, [tmp_path], 20_000)
    words = [small, tmp_path / "a", invented(once, MANY), tmp_path / "b"]
    done = subprocess.run([sys.executable, "-c", measure, *map(str, words)], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert float(done.stdout) < 20  # MiB
    array = np.load(tmp_path / "b" / "embeddings.npy", mmap_mode="r")
    assert array.shape == (199_800, 64)
