"""The index: FAISS opens it, it finds what exact search finds, and it follows the dataset."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import error_of
from invented import clustered, commit, write_dataset
from later import Later
from small import embed, write_pictures

from resfeat import downstream
from resfeat.dataset import Parts, open_dataset
from resfeat.downstream import Neighbours, Wanted, build_index, open_index
from resfeat.downstream.index import About, indexing, ranking
from resfeat.downstream.index import index as index_module
from resfeat.downstream.index import recall as recall_module
from resfeat.downstream.index.kinds import COARSE, KINDS, build_bytes, bytes_of, choose
from resfeat.errors import ResfeatError, UsageError
from resfeat.storage.draft import DiskDraft

faiss = Later("faiss")
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, SHARD = 2000, 32, 250
LEAST = {"flat": 1, "ivf": 0.9, "sq8": 0.9, "pq": 0.2, "hnsw": 0.9}


@pytest.fixture(scope="module")
def vectors():
    return clustered(ROWS, DIM)


@pytest.fixture(scope="module")
def whole(vectors, tmp_path_factory):
    """Not to be changed."""
    return write_dataset(tmp_path_factory.mktemp("index") / "out", vectors, shard_size=SHARD)


@pytest.fixture
def dataset(whole, tmp_path):
    """The same, of one's own, with an index of flat."""
    shutil.copytree(whole.layout.root, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    build_index(dataset, Wanted(kind="flat"))
    return dataset


def folder(dataset):
    return dataset.layout.index("avgpool")


def nearest(vectors, queries, k, metric="cosine"):
    """Numbers of the nearest rows [Q, k], by numpy alone."""
    if metric == "l2":
        far = ((queries[:, None].astype(float) - vectors[None]) ** 2).sum(-1)
    else:
        far = -queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    return np.argsort(far, axis=1)[:, :k]


def numbers(found):
    return [[int(name.partition(".")[0]) for name in row] for row in found.ids]


def recall(found, expected):
    pairs = zip(found, expected.tolist(), strict=True)
    return sum(len(set(row) & set(true)) for row, true in pairs) / expected.size


def by_index(index, queries, k):
    """One query after another: of many, exact search is quicker."""
    found = [index.search(query, k) for query in queries]
    ids, scores = zip(*((each.ids, each.scores) for each in found), strict=True)
    return Neighbours(np.concatenate(ids), np.concatenate(scores))


@pytest.mark.parametrize("kind", KINDS)
def test_faiss_opens_it_without_us_and_finds_what_is_near(kind, whole, vectors, tmp_path):
    shutil.copytree(whole.layout.root, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    about = build_index(dataset, Wanted(kind=kind)).about
    assert (about.kind, about.rows, about.dim) == (kind, ROWS, DIM)
    queries = clustered(ROWS, DIM)[::40] + 0.1 * clustered(50, DIM, seed=9)
    expected = nearest(vectors, queries, 10)

    index = faiss.read_index(str(folder(dataset) / "index.faiss"))
    ids = pq.read_table(folder(dataset) / "ids.parquet").to_pydict()
    id_of = dict(zip(ids["faiss_id"], ids["id"], strict=True))
    assert [*id_of.values()] == [f"{n:06}.jpg" for n in range(ROWS)]
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    scores, found = index.search(queries / lengths, 10)
    by_faiss = [[int(id_of[n].partition(".")[0]) for n in row] for row in found]
    assert recall(by_faiss, expected) >= LEAST[kind]

    ours = by_index(open_index(dataset), queries, 10)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = np.take_along_axis((queries / lengths) @ units.T, np.array(numbers(ours)), axis=1)
    assert np.allclose(ours.scores, cosines, atol=1e-6) and ours.scores.dtype == np.float32
    if kind in COARSE:  # FAISS's own are not the cosines, and ours finds more
        assert not np.allclose(ours.scores, scores, atol=1e-4)
        assert recall(numbers(ours), expected) > recall(by_faiss, expected) - 1e-9
        assert recall(numbers(ours), expected) > 0.9
        exact = downstream.nearest(dataset, queries, 10)
        is_same = ours.ids == exact.ids
        assert np.array_equal(ours.scores[is_same], exact.scores[is_same])
    else:
        assert numbers(ours) == by_faiss and np.allclose(ours.scores, scores)
    # As a search does it; on other rows than these, which are like them.
    assert abs(about.measured.recall_at_10 - recall(numbers(ours), expected)) < 0.1
    assert about.measured.queries == 200 and about.measured.rows == ROWS - 200


def test_by_distance(dataset, vectors):
    about = build_index(dataset, Wanted(metric="l2")).about
    assert about.metric == "l2" and about.kind == "flat"
    queries = 3 * vectors[:20]  # another length: other neighbours than by the angle
    expected = nearest(vectors, queries, 5, "l2")
    found = open_index(dataset).search(queries, 5)
    assert numbers(found) == expected.tolist()
    distances = np.linalg.norm(queries[0] - vectors[expected[0]], axis=1)
    assert np.allclose(found.scores[0], distances, atol=1e-4)
    assert expected.tolist() != nearest(vectors, queries, 5).tolist()


@pytest.mark.parametrize("rows", [SHARD - 50, SHARD + 50])
def test_a_part_that_is_replaced_while_it_is_read_is_one_line(rows, dataset, vectors):
    parts = Parts(dataset)
    commit(dataset.layout, 0, [f"{n:06}.jpg" for n in range(rows)], vectors[:rows])
    with pytest.raises(ResfeatError, match="changed while it was read"):
        list(parts.blocks())
    if rows < SHARD:
        with pytest.raises(ResfeatError, match="changed while it was read"):
            parts.vectors_at(np.arange(parts.rows))


def test_what_is_not_asked_for_stays_as_it_was_asked_for(dataset):
    build_index(dataset, Wanted(metric="l2"))
    about = build_index(dataset, Wanted(kind="ivf")).about
    assert (about.kind, about.metric) == ("ivf", "l2")
    assert build_index(dataset, Wanted(kind="auto")).about.kind == "flat"


def test_what_codes_find_is_compared_in_small_pieces_too(dataset, vectors, monkeypatch):
    build_index(dataset, Wanted(kind="sq8", metric="l2"))
    queries, index = clustered(30, DIM, seed=3), open_index(dataset)
    index.faiss.nprobe = index.faiss.nlist  # all lists
    whole = index.search(queries, 2)
    expected = nearest(vectors, queries, 2, "l2")
    assert recall(numbers(whole), expected) > 0.95
    far = np.linalg.norm(queries[:, None] - vectors[np.array(numbers(whole))], axis=2)
    assert np.allclose(whole.scores, far, rtol=1e-6)
    monkeypatch.setattr(ranking, "RANKED_BYTES", 7 * 4 * DIM)
    monkeypatch.setattr(ranking, "RANKED_PAIRS", 7 * 4 * 2)
    pieces = index.search(queries, 2)
    assert np.array_equal(pieces.ids, whole.ids) and np.array_equal(pieces.scores, whole.scores)
    commit(dataset.layout, 0, ["other.jpg"], vectors[:1])  # since the index was opened
    with pytest.raises(ResfeatError, match="changed while it was searched"):
        index.search(vectors[:50], 1)


def test_where_codes_find_nearly_all_exact_search_is_quicker(whole, vectors, tmp_path, monkeypatch):
    shutil.copytree(whole.layout.root, tmp_path / "out")
    build_index(open_dataset(tmp_path / "out"), Wanted(kind="pq"))
    index, ranked, rank = open_index(open_dataset(tmp_path / "out")), [], ranking.rank
    monkeypatch.setattr(ranking, "rank", lambda *how: ranked.append(how) or rank(*how))
    index.faiss.nprobe = index.faiss.nlist  # all lists
    # 16 times k are compared once more.
    for count, k, by_codes in [(1, 12, 1), (1, 13, 0), (10, 1, 1), (10, 2, 0), (2000, 10, 0)]:
        found = index.search(vectors[:count], k)
        assert len(ranked) == by_codes
        ranked.clear()
        if not by_codes:
            exact = downstream.nearest(open_dataset(tmp_path / "out"), vectors[:count], k)
            assert np.array_equal(found.ids, exact.ids)


def test_many_queries_read_each_part_once(dataset, vectors, monkeypatch):
    build_index(dataset, Wanted(kind="sq8"))
    index, read, find = open_index(dataset), [], type(dataset).find
    monkeypatch.setattr(
        type(dataset), "find",
        lambda self, ids, layer, shards: read.extend(shards) or find(self, ids, layer, shards),
    )  # fmt: skip
    index.search(clustered(40, DIM, seed=3), 2)
    assert read == sorted(set(read)) and len(read) > 4


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_flat_gives_what_exact_search_gives_in_its_order(metric, vectors, tmp_path):
    """Also of equal ones, which are more than it was asked for, or of which one came late."""
    vectors = vectors.copy()
    vectors[[1500, 400, 1990]] = vectors[9]
    vectors[[*range(600, 640), 30]] = vectors[3]
    vectors[50] = 0
    dataset = write_dataset(tmp_path / "out", vectors, shard_size=SHARD)
    build_index(dataset, Wanted(kind="flat", metric=metric))
    ids = [f"{n:06}.jpg" for n in range(SHARD)]
    # The new one has the largest number, and stands before the others.
    commit(dataset.layout, 0, ["new.jpg", *ids], np.stack([vectors[9], *vectors[:SHARD]]))
    assert build_index(dataset).done.startswith("Updated: 1 rows added")
    queries = np.concatenate([vectors[:60], clustered(20, DIM, seed=4)])
    for k in (1, 3, 10):
        found = open_index(dataset).search(queries, k)
        exact = downstream.nearest(dataset, queries, k, metric=metric)
        assert np.array_equal(found.ids, exact.ids)
        assert np.allclose(found.scores, exact.scores, atol=1e-6)
    assert found.ids[9, :4].tolist() == ["new.jpg", "000009.jpg", "000400.jpg", "001500.jpg"]
    assert found.ids[3, :3].tolist() == ["000003.jpg", "000030.jpg", "000600.jpg"]


def test_flat_reads_the_dataset_for_ties_only_where_they_are_very_many(
    vectors, tmp_path, monkeypatch
):
    """A dozen images without anything on them are usual."""
    vectors = vectors.copy()
    vectors[100:140] = vectors[3]
    dataset = write_dataset(tmp_path / "out", vectors, shard_size=SHARD)
    build_index(dataset, Wanted(kind="flat"))
    read = []
    monkeypatch.setattr(
        index_module, "nearest", lambda *a: read.append(len(a[1])) or downstream.nearest(*a)
    )
    queries = vectors[[3, 7]]
    found = open_index(dataset).search(queries, 5)
    assert not read
    assert found.ids[0].tolist() == [f"{n:06}.jpg" for n in (3, 100, 101, 102, 103)]
    monkeypatch.setattr(index_module, "RANKED_PAIRS", 50)
    assert np.array_equal(open_index(dataset).search(queries, 5).ids, found.ids)
    assert read == [1]


def test_what_faiss_gives_is_put_in_order_and_within_bounds():
    table = {"faiss_id": [3, 5, 7, 9], "id": list("abcd"), "shard": [2, 0, 0, 0], "hash": [0] * 4}
    listed = ranking.Listed(pa.table(table | {"row": [0, 1, 0, 2]}))
    over = np.nextafter(np.float32(1), np.float32(2))
    cosines = np.array([[over, 1, 1, 0.5], [0.5, 0.5, -0.1, -over]], np.float32)
    found = np.array([[3, 5, 7, 9], [9, 3, 7, 5]])
    scores, ordered = listed.ordered(cosines, found, "cosine")
    assert ordered.tolist() == [[7, 5, 3, 9], [9, 3, 7, 5]]
    assert scores.tolist()[0] == [1, 1, 1, 0.5] and scores.min() == -1
    squares = np.array([[-1e-9, 0, 4, 4]], np.float32)
    scores, ordered = listed.ordered(squares, found[:1], "l2")
    assert scores.tolist() == [[0, 0, 2, 2]] and ordered.tolist() == [[5, 3, 7, 9]]


@pytest.mark.parametrize("kind", ["flat", "ivf", "sq8"])
def test_times_are_those_of_both_ways_to_search(kind, dataset, monkeypatch):
    """What codes and flat find is compared as in a search, and exact search reads the dataset."""
    build_index(dataset, Wanted(kind="hnsw"))  # so that it is made anew
    clock = [0.0]

    def takes(seconds, does):
        def do(*how):
            clock[0] += seconds
            return does(*how)

        return do

    monkeypatch.setattr(recall_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(ranking, "rank", takes(5, ranking.rank))
    monkeypatch.setattr(indexing, "nearest", takes(7, indexing.nearest))
    measured = build_index(dataset, Wanted(kind=kind)).about.measured
    assert measured.exact_seconds * measured.queries == pytest.approx(7)
    assert measured.seconds * measured.queries == pytest.approx(0 if kind == "ivf" else 5)
    assert measured.recall_at_10 > 0.9


def test_an_index_of_an_older_resfeat_is_made_anew_as_it_was_asked_for(dataset, resfeat):
    build_index(dataset, Wanted(kind="ivf", metric="l2"))
    path = folder(dataset) / "about.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    out = dataset.layout.root
    done = resfeat("search", out, "--id", "000007.jpg", "--metric", "l2", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["neighbours"][0]["id"] == "000007.jpg"
    assert done.stderr == (
        "Note: the index was made by an older resfeat: `resfeat index` brings it up to date; this "
        "search is exact\n"
    )
    first, second, *_ = resfeat("index", out).stdout.splitlines()
    assert first == "Made anew: the index was made by an older resfeat"
    assert second.startswith("ivf, l2: ") and open_index(dataset).stale is None


@pytest.mark.parametrize("k", [0, -1])
def test_as_many_as_there_cannot_be_is_one_line(k, dataset, vectors):
    with pytest.raises(UsageError, match=f"-k {k}: give at least 1"):
        open_index(dataset).search(vectors[:1], k)


def test_a_search_reads_the_files_of_an_index_once_to_check_them(dataset, resfeat, monkeypatch):
    read, digest_of = [], index_module.digest_of
    monkeypatch.setattr(
        index_module, "digest_of", lambda path: read.append(path.name) or digest_of(path)
    )
    assert resfeat("search", dataset.layout.root, "--id", "000007.jpg").returncode == 0
    assert sorted(read) == ["ids.parquet", "index.faiss"]
    index = open_index(dataset)
    index.check()
    path = folder(dataset) / "ids.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"X")  # whatever was checked is checked again
    with pytest.raises(ResfeatError, match="is not what was written"):
        index.check()


def test_more_than_there_are(dataset, vectors):
    for kind in ("flat", "ivf", "sq8"):  # the lists that it looks into hold less
        build_index(dataset, Wanted(kind=kind))
        found = open_index(dataset).search(vectors[0], ROWS + 5)
        assert found.ids.shape == (1, ROWS) and len(set(found.ids[0])) == ROWS


def changed(dataset, vectors):
    """Of shard 1 two rows are other ones, one is gone, one is new; shard 3 is gone. Gives all rows
    that there are now."""
    now = {f"{n:06}.jpg": vector for n, vector in enumerate(vectors)}
    ids = [f"{n:06}.jpg" for n in range(SHARD, 2 * SHARD)]
    for name in ids[:2]:
        now[name] = -now[name]
    del now[ids[2]]
    now["999999.jpg"] = clustered(1, DIM, seed=5)[0]
    rows = [*(name for name in ids if name in now), "999999.jpg"]
    commit(dataset.layout, 1, rows, np.stack([now[name] for name in rows]))
    (dataset.layout.embeddings / dataset.layout.part_name(3)).unlink()
    for n in range(3 * SHARD, 4 * SHARD):
        del now[f"{n:06}.jpg"]
    return now


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_it_follows_the_dataset_and_reads_only_what_changed(kind, dataset, vectors, monkeypatch):
    build_index(dataset, Wanted(kind=kind))
    now = changed(dataset, vectors)
    stale = open_index(dataset)
    assert "of which 2 of 7 parts have changed" in stale.stale
    queries = clustered(40, DIM, seed=3)
    names, rows = list(now), np.stack(list(now.values()))
    expected = [[names[n] for n in row] for row in nearest(rows, queries, 10)]
    with pytest.warns(UserWarning, match="older than the dataset.* this search is exact"):
        found = stale.search(queries, 10)
    assert found.ids.tolist() == expected

    read, blocks = [], Parts.blocks
    monkeypatch.setattr(
        Parts, "blocks",
        lambda self, shards=None, start=0: read.append(shards) or blocks(self, shards, start),
    )  # fmt: skip
    outcome = build_index(dataset)
    assert outcome.done == "Updated: 3 rows added and 253 removed, in 2 of 7 parts"
    assert read == [[1], []]  # nothing is left of the other
    assert outcome.about.kind == kind and outcome.about.changed == 256
    index = open_index(dataset)
    assert index.stale is None and outcome.about.rows == len(now) == index.faiss.ntotal
    assert sorted(index.ids["id"].to_pylist()) == sorted(now)
    if kind == "ivf":
        index.faiss.nprobe = index.faiss.nlist  # all lists: exact
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = index.search(queries, 10)
    assert found.ids.tolist() == expected
    assert "nothing to do" in build_index(dataset).done


def test_when_it_is_made_anew_and_why(dataset, vectors):
    build_index(dataset, Wanted(kind="hnsw"))
    changed(dataset, vectors)
    outcome = build_index(dataset)
    assert outcome.done == "Made anew: nothing can be removed from a graph (hnsw)"
    assert outcome.about.kind == "hnsw" and outcome.about.rows == ROWS - SHARD
    assert "it was hnsw, and flat is asked for" in build_index(dataset, Wanted(kind="flat")).done
    for shard in (4, 5):
        (dataset.layout.embeddings / dataset.layout.part_name(shard)).unlink()
    assert "500 rows came or went" in build_index(dataset).done
    assert open_index(dataset).stale is None


def test_the_kind_is_chosen_by_size_and_memory():
    chosen = [
        (rows, gb, choose(rows, 2048, int(gb * 1e9)).kind)
        for rows, gb in ((1000, 16), (1_000_000, 16), (1_000_000, 6), (1_000_000, 1))
    ]
    assert [kind for *_, kind in chosen] == ["flat", "ivf", "sq8", "pq"]
    for rows, gb, kind in chosen:
        assert bytes_of(kind, rows, 2048) < gb * 1e9
    with pytest.raises(UsageError, match=r"takes at least .* give more --memory"):
        choose(1_000_000, 2048, 10**8)
    with pytest.raises(UsageError, match=r"hnsw of 1,000,000 x 2,048 takes .* another --kind"):
        choose(1_000_000, 2048, 6 * 10**9, "hnsw")


def test_it_is_seen_whole_or_not_at_all(dataset, vectors, monkeypatch):
    """Wherever writing stops, there is the old one, none, or the new one."""
    changed(dataset, vectors)
    for steps in range(3):
        shutil.copytree(dataset.layout.root, dataset.layout.root.with_name(f"stopped{steps}"))
        there, left = open_dataset(dataset.layout.root.with_name(f"stopped{steps}")), [steps]

        def stopped(self, target, left=left, publish=DiskDraft.publish):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            publish(self, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(DiskDraft, "publish", stopped)
            build_index(there)
        assert open_index(there) is None
        assert {path.name for path in folder(there).iterdir()} <= {"index.faiss", "ids.parquet"}
        assert build_index(there).about.rows == ROWS - SHARD


def test_search_goes_by_a_fresh_index_and_says_why_not(dataset, vectors, resfeat, monkeypatch):
    scanned = []
    scan = downstream.nearest
    monkeypatch.setattr(downstream, "nearest", lambda *how: scanned.append(how) or scan(*how))

    def searched(*options):
        """Ids, cosines or distances, whether all rows were looked at, and what was noted."""
        scanned.clear()
        done = resfeat("search", dataset.layout.root, "--id", "000007.jpg", "--json", *options)
        ((query,), note) = json.loads(done.stdout), done.stderr.strip()
        ids, *scores = zip(*(each.values() for each in query["neighbours"]), strict=True)
        return list(ids), np.ravel(scores), bool(scanned), note

    expected = [f"{n:06}.jpg" for n in nearest(vectors, vectors[7:8], 10)[0]]
    by_index, exact = searched(), searched("--exact")
    assert by_index[0] == exact[0] == expected and np.allclose(by_index[1], exact[1], atol=1e-6)
    assert by_index[2:] == (False, "") and exact[2:] == (True, "")
    *_, was_scanned, note = searched("--metric", "l2")
    assert was_scanned
    assert note == "Note: the index is for cosine, and not for l2; this search is exact"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        ids, _, was_scanned, note = searched()
        assert ids == expected and was_scanned and "pip install 'resfeat[faiss]'" in note
    changed(dataset, vectors)
    ids, _, was_scanned, note = searched()
    assert was_scanned and note.startswith("Note: the index is older than the dataset, of which 2")
    assert note.endswith("`resfeat index` brings it up to date; this search is exact")
    assert resfeat("index", dataset.layout.root).returncode == 0
    assert searched()[0] == ids and searched()[2:] == (False, "")
    path = folder(dataset) / "ids.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    ids_now, _, was_scanned, note = searched()
    assert ids_now == ids and was_scanned and "ids.parquet is damaged" in note


def refused(done, code=2):
    assert done.returncode == code and done.stdout == ""
    return error_of(done.stderr)


def test_what_cannot_be_indexed_is_one_line(dataset, resfeat, monkeypatch, tmp_path):
    out = dataset.layout.root
    assert "no resfeat dataset" in refused(resfeat("index", tmp_path))
    assert "has no layer 'x': give one of avgpool" in refused(resfeat("index", out, "--layer", "x"))
    told = refused(resfeat("index", out, "--kind", "ivf", "--memory", "0.0001"))
    assert "ivf of 2,000 x 32 takes" in told and "more --memory" in told
    shutil.copytree(out, tmp_path / "empty")
    for part in (tmp_path / "empty" / "embeddings").iterdir():
        part.unlink()
    assert "has no embeddings yet" in refused(resfeat("index", tmp_path / "empty"))
    descriptor = os.open(folder(dataset), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process is making the index" in refused(resfeat("index", out), 1)
    os.close(descriptor)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install 'resfeat[faiss]'" in refused(resfeat("index", out))


@pytest.mark.parametrize("name", ["index.faiss", "ids.parquet", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_named_and_the_next_index_mends_it(name, damage, dataset, vectors, resfeat):
    path = folder(dataset) / name
    content = bytearray(path.read_bytes())
    place = content.index(b"kind") if name == "about.json" else len(content) // 2
    content[place] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-9] if damage == "cut" else content)
    if (name, damage) == ("about.json", "gone"):
        assert open_index(dataset) is None
    else:
        with pytest.raises(ResfeatError, match=f"{name} is damaged .*`resfeat index` makes it"):
            open_index(dataset).search(vectors[:1], 3)
    done = resfeat("index", dataset.layout.root, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"].startswith("Made")
    assert numbers(open_index(dataset).search(vectors[7:8], 1)) == [[7]]


def test_what_was_asked_for_outlives_damage_and_less_memory_counts(dataset):
    def damage():
        (folder(dataset) / "index.faiss").write_bytes(b"gone")

    build_index(dataset, Wanted(kind="sq8", metric="l2"))
    damage()
    about = build_index(dataset).about
    assert (about.kind, about.metric) == ("sq8", "l2")
    about = build_index(dataset, Wanted(kind="auto")).about
    assert (about.kind, about.metric) == ("flat", "l2")
    outcome = build_index(dataset, Wanted(memory=build_bytes("flat", about.rows, about.dim) - 1))
    assert outcome.about.kind == "sq8" and "as it is it may take" in outcome.done


def test_an_index_of_other_embeddings_is_not_used(dataset, vectors, resfeat):
    path = folder(dataset) / "about.json"
    content = json.loads(path.read_text())
    for field, value, told in (
        ("fingerprint", "f" * 64, "fingerprint ffffffffffff, and these have"),
        ("layer", "layer3", "of the layer layer3, and not of avgpool"),
    ):
        path.write_text(json.dumps(content | {field: value}))
        with pytest.warns(UserWarning, match=told):
            assert numbers(open_index(dataset).search(vectors[:1], 1)) == [[0]]
        done = resfeat("index", dataset.layout.root)
        assert done.returncode == 0 and told in done.stdout.splitlines()[0]
        assert open_index(dataset).stale is None


def test_it_follows_an_update_of_images(tmp_path, resfeat):
    (tmp_path / "in").mkdir()
    paths = write_pictures(tmp_path / "in", 12)
    embed(tmp_path / "out", tmp_path / "in")
    assert resfeat("index", tmp_path / "out", "--kind", "ivf").returncode == 0
    write_pictures(tmp_path / "in", 14)  # two more
    paths[0].unlink()
    embed(tmp_path / "out", tmp_path / "in", update=True)
    dataset = open_dataset(tmp_path / "out")
    assert "older than the dataset" in open_index(dataset).stale
    done = resfeat("index", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    index = open_index(dataset)
    assert index.stale is None and index.about.generation == 1 and index.about.kind == "ivf"
    there = {name for ids, _ in dataset.vectors() for name in ids.to_pylist()}
    assert set(index.ids["id"].to_pylist()) == there and len(there) == 13


def test_what_it_says_of_itself_comes_back(dataset):
    about = open_index(dataset).about
    assert About.load(folder(dataset)) == about == build_index(dataset).about


def test_nothing_of_it_is_loaded_by_an_extraction():
    code = (
        "import sys, resfeat.extraction, resfeat.cli.extract\n"
        "print([name for name in sys.modules if name.startswith(('faiss', 'resfeat.downstream'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
