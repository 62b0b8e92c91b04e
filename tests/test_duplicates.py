"""Groups of duplicates: those that comparing all pairs gives, with what is said of each."""

import io
import json
import shutil
import tarfile
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import clustered, commit, write_dataset
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small import embed, write_pictures

from resfeat.dataset import open_dataset
from resfeat.downstream import Wanted, build_index, find_duplicates, open_index
from resfeat.downstream.duplicates import Links, copies, pairs
from resfeat.errors import StoreError, UsageError
from resfeat.sources import Item, cells, item_of, listing, members, reading


def grouped(cosines, threshold):
    """Connected rows by a matrix of cosines, by a walk from each."""
    left, groups = set(range(len(cosines))), []
    while left:
        waiting, group = [min(left)], set()
        while waiting:
            row = waiting.pop()
            if row not in group:
                group.add(row)
                waiting += np.flatnonzero(cosines[row] >= threshold).tolist()
        left -= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


def near(rows=600, dim=16):
    """Vectors with duplicates: equal ones, near ones, and chains."""
    vectors = clustered(rows, dim, spread=1.0)
    chance = np.random.default_rng(1)
    vectors[100] = vectors[7] = vectors[431]
    vectors[8] = 2 * vectors[7]  # another length
    for n in range(250, 280):  # each near the one before it, into the next part
        vectors[n] = vectors[n - 1] + 0.12 * chance.standard_normal(dim)
    for n in (20, *range(300, 312), 333, 512):  # in several parts
        vectors[n] = vectors[299] + 0.05 * chance.standard_normal(dim)
    return vectors


@pytest.fixture(scope="module")
def vectors():
    return near()


@pytest.fixture(scope="module")
def dataset(vectors, tmp_path_factory):
    """Not to be changed."""
    return write_dataset(tmp_path_factory.mktemp("duplicates") / "out", vectors, shard_size=90)


def cosines_of(vectors):
    units = vectors.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    return units @ units.T


def rows_of(group):
    return sorted(int(member.id.partition(".")[0]) for member in group.members)


@pytest.mark.parametrize("held", [None, 100])
def test_the_groups_are_those_of_all_pairs(held, dataset, vectors, monkeypatch):
    """Also where the rows are read several times, since few are held."""
    if held:
        monkeypatch.setattr("resfeat.downstream.duplicates.pairs.HELD_BYTES", held * 4 * 16)
        monkeypatch.setattr("resfeat.downstream.duplicates.pairs.memory_bytes", lambda: 0)
        monkeypatch.setattr("resfeat.downstream.duplicates.pairs.COMPARED", 7)
    cosines = cosines_of(vectors)
    found = find_duplicates(dataset, 0.95)
    expected = grouped(cosines, 0.95)
    assert len(expected) >= 3 and max(map(len, expected)) > 12
    assert sorted(map(rows_of, found)) == expected
    assert [len(group.members) for group in found] == sorted(map(len, expected), reverse=True)
    for group in found:
        rows, kept = rows_of(group), int(group.members[0].id.partition(".")[0])
        every = cosines[np.ix_(rows, rows)]
        assert not group.is_bound and group.least_cosine == pytest.approx(every.min(), abs=1e-6)
        for member in group.members:
            row = int(member.id.partition(".")[0])
            assert member.cosine == pytest.approx(cosines[kept, row], abs=1e-6)
            assert member.is_equal == np.array_equal(vectors[row], vectors[kept])
    # A chain joins images that are less alike than the threshold, and that is told.
    assert min(group.least_cosine for group in found) < 0.94


def test_by_the_index_they_are_the_same(vectors, tmp_path):
    dataset = write_dataset(tmp_path / "out", vectors, shard_size=90)
    commit(dataset.layout, 7, [], vectors[:0])  # all of its images failed
    expected = find_duplicates(dataset, 0.95)
    build_index(dataset, Wanted(kind="flat"))
    index = open_index(dataset)
    assert find_duplicates(dataset, 0.95, index=index) == expected
    # One that lost rows and got others has other numbers than places.
    ids = [f"{n:06}.jpg" for n in range(90, 180)]
    commit(dataset.layout, 1, [*ids[50:], "new.jpg"], vectors[[*range(140, 180), 5]])
    build_index(dataset)
    by_index = find_duplicates(dataset, 0.95, index=open_index(dataset))
    assert by_index == find_duplicates(dataset, 0.95) != expected
    assert any("new.jpg" in [each.id for each in group.members] for group in by_index)


@pytest.mark.parametrize("kind", ["sq8", "pq"])
def test_by_an_index_of_codes_they_are_the_same(kind, vectors, tmp_path, monkeypatch):
    """Whose cosines are not the true ones: each group is by these, to the last bit."""
    dataset = write_dataset(tmp_path / "out", vectors, shard_size=90)
    build_index(dataset, Wanted(kind=kind))
    index = open_index(dataset)
    index.faiss.nprobe = index.faiss.nlist
    for checked in (pairs.CHECKED_BYTES, 64 * 3):
        monkeypatch.setattr(pairs, "CHECKED_BYTES", checked)
        for threshold in (0.95, 0.999):
            expected = find_duplicates(dataset, threshold)
            assert len(expected) > 1
            assert find_duplicates(dataset, threshold, index=index) == expected


def test_of_a_large_group_the_least_cosine_is_a_bound(dataset, vectors, monkeypatch):
    exact = {group.members[0].id: group for group in find_duplicates(dataset, 0.95)}
    monkeypatch.setattr("resfeat.downstream.duplicates.groups.LARGE", 10)
    monkeypatch.setattr("resfeat.downstream.duplicates.groups.HELD_BYTES", 12 * 4 * 16)
    found = find_duplicates(dataset, 0.95)
    assert {group.is_bound for group in found} == {True, False}
    for group in found:
        true = exact[group.members[0].id]
        assert group.is_bound == (len(group.members) > 10)
        assert [each.id for each in group.members] == [each.id for each in true.members]
        assert group.least_cosine <= true.least_cosine + 1e-6
        if not group.is_bound:
            assert group.least_cosine == pytest.approx(true.least_cosine, abs=1e-6)


def test_equal_vectors_are_a_group_at_any_threshold_and_zeros_are_none(tmp_path):
    vectors = np.eye(6, dtype=np.float32)
    vectors[3] = vectors[1]
    vectors[4:] = 0
    (group,) = find_duplicates(write_dataset(tmp_path / "out", vectors), 1)
    assert rows_of(group) == [1, 3] and group.least_cosine == 1
    assert all(member.is_equal for member in group.members)


def test_the_largest_picture_is_kept_and_then_the_first_id(tmp_path):
    vectors = np.ones((5, 4), np.float32)
    dataset = write_dataset(tmp_path / "out", vectors)
    ids = ["d.jpg", "c.jpg", "b.jpg", "a.jpg", "e.jpg"]
    sizes = [(100, 100), (200, 100), (50, 400), (10, 10), (199, 100)]
    commit(dataset.layout, 0, ids, vectors, sizes)
    (group,) = find_duplicates(dataset, 0.99)
    assert [member.id for member in group.members] == ["b.jpg", "a.jpg", "c.jpg", "d.jpg", "e.jpg"]


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60),
       at_once=st.integers(1, 60))  # fmt: skip
def test_links_join_what_is_joined(pairs, at_once):
    links, matrix = Links(40), np.eye(40)
    for start in range(0, len(pairs), at_once):
        some = np.array(pairs[start : start + at_once]).T
        links.link(some[0], some[1])
    for left, right in pairs:
        matrix[left, right] = matrix[right, left] = 1
    assert sorted(group.tolist() for group in links.groups()) == grouped(matrix, 1)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.loaded = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_command_with_real_pictures(tmp_path, resfeat):
    (tmp_path / "in").mkdir()
    first, *_ = write_pictures(tmp_path / "in", 6)
    evil = "<script>alert(1)<&.png"
    with Image.open(first) as picture:
        picture.save(tmp_path / "in" / evil, compress_level=0)  # other bytes, equal pixels
        picture.resize((48, 40)).save(tmp_path / "in" / "small.png")
    embed(tmp_path / "out", tmp_path / "in")
    table, page = tmp_path / "d.parquet", tmp_path / "d.html"
    command = ["duplicates", tmp_path / "out", "--threshold", "0.999999"]
    done = resfeat(*command, "--out", table, "--html", page)
    assert done.returncode == 0, done.stderr
    there = {
        path.relative_to(tmp_path / "in").as_posix() for path in (first, tmp_path / "in" / evil)
    }
    kept, other = sorted(there)
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["2", "1.0000", *kept.split()]
    assert lines[2].split() == ["equal", *other.split()]
    assert lines[3] == ("1 groups; 1 images beside those to keep, 0 of them exact copies of a file")
    rows = pq.read_table(table).to_pylist()
    assert [(row["group"], row["id"], row["keep"], row["equal"]) for row in rows] == [
        (0, kept, True, True), (0, other, False, True),
    ]  # fmt: skip
    assert all(row["least_cosine"] == 1 and not row["least_is_bound"] for row in rows)
    told = json.loads(resfeat(*command, "--json").stdout)
    assert told["groups"][0]["keep"] == kept and told["index"] is None
    assert [each["id"] for each in told["groups"][0]["members"]] == [kept, other]

    tags = Tags(page.read_text())
    assert "script" not in tags.tags and tags.tags.count("img") == 2
    assert {kept, other} <= set(tags.texts)
    assert all(each.startswith("data:") for each in tags.loaded)
    assert "http" not in page.read_text().replace("http-equiv", "")


def test_exact_is_what_has_the_same_bytes(tmp_path, resfeat):
    """Equal pixels are not enough, nor the same size beside them. Of two copies neither of which is
    kept it is told, too. A file that is gone is no copy of anything."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
    for name, text in ("a.png", "one"), ("b.png", "one"), ("c.png", "two"), ("d.png", "more"):
        about = PngInfo()
        about.add_text("text", text)
        Image.fromarray(pixels).save(source / name, pnginfo=about)
    for name in ("e.png", "f.png"):
        Image.fromarray(pixels).resize((40, 32)).save(source / name)
    assert (source / "a.png").stat().st_size == (source / "c.png").stat().st_size
    embed(out, source)
    command = ["duplicates", out, "--threshold", "0.5"]

    def told():
        done = resfeat(*command, "--json", "--out", tmp_path / "d.parquet")
        (group,) = json.loads(done.stdout)["groups"]
        rows = pq.read_table(tmp_path / "d.parquet").to_pylist()
        found = {each["id"]: (each["is_equal"], each["copy_of"]) for each in group["members"]}
        assert found == {row["id"]: (row["equal"], row["copy_of"]) for row in rows}
        unread = {row["id"]: row["unread"] for row in rows if row["unread"]}
        assert unread == {m["id"]: m["unread"] for m in group["members"] if m["unread"]}
        return found, unread, done.stderr

    equal = {"a.png": (True, None), "c.png": (True, None), "d.png": (True, None)}
    small = {"e.png": (False, None), "f.png": (False, "e.png")}
    found, unread, notes = told()
    assert found == equal | {"b.png": (True, "a.png")} | small
    assert unread == {} and "Note" not in notes
    lines = resfeat(*command, "--html", tmp_path / "d.html").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["exact", "equal", "equal"]
    assert lines[-2] == (
        "1 groups; 5 images beside those to keep, 2 of them exact copies of a file"
    )
    headings = [each for each in Tags((tmp_path / "d.html").read_text()).texts if "bytes" in each]
    assert [each.partition(",")[0] for each in headings[:4]] == ["keep", "exact", "equal", "equal"]
    assert headings[5].endswith("a copy of e.png")

    (source / "b.png").unlink()
    found, unread, notes = told()
    assert found == equal | {"b.png": (True, None)} | small
    assert list(unread) == ["b.png"] and unread["b.png"].startswith("not_found")
    (note,) = (line for line in notes.splitlines() if line.startswith("Note:"))
    assert "1 images cannot be read any more" in note and "b.png: not_found" in note


class Listed:
    """A dataset of these items."""

    def __init__(self, items):
        self._items = {item.id: item for item in items}

    def items(self, ids):
        return {each: self._items[each] for each in ids if each in self._items}


def test_copies_are_told_and_a_store_out_of_reach_costs_no_disk(tmp_path, monkeypatch):
    """Nor is what was read before it is out of reach called unread."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"same" if name != "b" else b"else")
    items = [item_of(str(tmp_path / name))._replace(id=name) for name in ("a", "b", "c")]
    items += [Item(name, f"s3://bucket/{name}", 4, 0) for name in ("r", "s", "t")]
    read, told = reading.read, []

    def refused(item):
        if item.id == "r":
            return b"same", 4, 0
        if item.uri.startswith("s3"):
            raise StoreError("bucket is out of reach")
        return read(item)

    monkeypatch.setattr(reading, "read", refused)
    alike = [(4, ["a", "b", "c", "r"]), (4, ["s", "t", "gone"])]
    found = copies.copies(Listed(items), alike, told.append)
    assert found.original == {"c": "a", "r": "a"}
    assert found.unread == {
        "s": "bucket is out of reach",
        "t": "bucket is out of reach",
        "gone": "it is not listed any more",
    }
    assert told == ["reading images that may be copies of a file: 0 of 6"]


def test_copies_in_the_rows_of_a_file_are_found_by_reading_it_once(tmp_path, monkeypatch):
    """However many, and in whatever order they are asked for: a row is reached through those before
    it."""
    rows = [{"bytes": b"x" * 50_000 if n % 2 else b"%d" % n, "path": None} for n in range(400)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "images.parquet")
    items = list(listing([str(tmp_path / "images.parquet")]))
    opened, streamed = [], cells._ascending
    monkeypatch.setattr(
        cells, "_ascending", lambda some: opened.append(len(some)) or streamed(some)
    )
    ids = [item.id for item in items]
    found = copies.copies(Listed(items), [(50_000, ids[::-1])], lambda step: None)
    assert opened == [400] and not found.unread
    assert len(found.original) == 199 and set(found.original.values()) == {ids[399]}


def test_copies_in_a_compressed_tar_are_found_by_opening_it_once(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        for n in range(200):
            member = tarfile.TarInfo(f"{n}.jpg")
            member.size = 1000
            tar.addfile(member, io.BytesIO(b"x" * 1000 if n % 2 else b"%1000d" % n))
    items = list(listing([str(tmp_path / "images.tar.gz")]))
    openings, opened = [], members.opened
    monkeypatch.setattr(members, "opened", lambda uri: openings.append(uri) or opened(uri))
    ids = [item.id for item in items]
    found = copies.copies(Listed(items), [(1000, ids[::-1])], lambda step: None)
    assert len(openings) == 1 and not found.unread
    assert len(found.original) == 99 and set(found.original.values()) == {ids[199]}


def test_images_whose_size_is_not_listed_are_read_a_few_at_a_time_by_what_they_were(
    tmp_path, monkeypatch
):
    """As those of a table. What is read at a time is bounded by bytes."""
    for n in range(20):
        (tmp_path / f"{n}").write_bytes(b"same")
    items = [item_of(str(tmp_path / f"{n}"))._replace(id=f"{n}") for n in range(20)]
    assert {item.size for item in items} == {None}
    together, read = [], reading.Run.read
    monkeypatch.setattr(
        reading.Run, "read", lambda run: together.append(len(run.items)) or read(run)
    )
    size = reading.RUN_BYTES // 2
    found = copies.copies(Listed(items), [(size, [item.id for item in items])], lambda step: None)
    assert max(together) == 2 and len(found.original) == 19


def test_what_was_found_is_not_lost_where_the_page_cannot_be_written(dataset, tmp_path, resfeat):
    out, table = dataset.layout.root, tmp_path / "d.parquet"
    done = resfeat("duplicates", out, "--out", table, "--html", "/dev/full")
    assert done.returncode == 1 and "No space left" in done.stderr.splitlines()[-1]
    assert " groups; " in done.stdout and pq.read_metadata(table).num_rows > 10
    none = tmp_path / "none.parquet"
    assert resfeat("duplicates", out, "--threshold", 1, "--out", none).returncode == 0
    assert pq.read_schema(none).equals(pq.read_schema(table))


def test_an_index_that_cannot_be_used_is_told_and_changes_nothing(vectors, tmp_path, resfeat):
    dataset = write_dataset(tmp_path / "out", vectors, shard_size=90)
    expected = json.loads(resfeat("duplicates", tmp_path / "out", "--json").stdout)["groups"]

    def noted(*options):
        done = resfeat("duplicates", tmp_path / "out", "--json", *options)
        told = json.loads(done.stdout)
        notes = [line for line in done.stderr.splitlines() if "all pairs" in line]
        assert told["groups"] == expected
        return told["index"], notes

    build_index(dataset, Wanted(kind="flat"))
    assert noted() == ("flat", []) and noted("--exact") == (None, [])
    folder = dataset.layout.index("avgpool")
    whole = shutil.copytree(folder, tmp_path / "whole")
    content = bytearray((folder / "index.faiss").read_bytes())
    content[-1] ^= 1
    (folder / "index.faiss").write_bytes(content)
    index, (note,) = noted()
    assert index is None and "index.faiss is damaged" in note and "all pairs" in note
    build_index(dataset, Wanted(metric="l2"))
    assert "is for l2, and not for cosine" in noted()[1][0]
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    commit(dataset.layout, 0, [f"{n:06}.jpg" for n in range(90)], vectors[:90], [(641, 480)] * 90)
    expected = json.loads(resfeat("duplicates", tmp_path / "out", "--json", "--exact").stdout)
    expected = expected["groups"]
    assert "older than the dataset" in noted()[1][0]
    about = folder / "about.json"
    for of_now in ({}, {"format": 1}):  # of the first, rows of parts as they were
        about.write_text(json.dumps(json.loads(about.read_text()) | of_now))
        with pytest.raises(UsageError, match=r"^the index .*: build it again "):
            find_duplicates(dataset, index=open_index(dataset))


def test_what_is_refused_is_one_line(dataset, tmp_path, resfeat):
    out = dataset.layout.root

    def refused(*arguments, code=2):
        done = resfeat("duplicates", *arguments)
        assert done.returncode == code and done.stdout == ""
        return error_of(done.stderr)

    done = resfeat("duplicates", out, "--threshold", "1", "--html", tmp_path / "none.html")
    assert done.returncode == 0 and "duplicates" in done.stdout
    for threshold in ("0", "1.5", "-1", "nan"):
        told = refused(out, "--threshold", threshold)
        assert told == f"Error: --threshold {threshold}: give a cosine above 0, and at most 1"
    assert "no resfeat dataset" in refused(tmp_path)
    assert "has no layer 'x'" in refused(out, "--layer", "x")
    assert "cannot write" in refused(out, "--out", tmp_path / "no" / "d.parquet", code=1)
    assert "cannot write" in refused(out, "--html", tmp_path / "no" / "d.html", code=1)
    shutil.copytree(out, tmp_path / "empty")
    for part in (tmp_path / "empty" / "embeddings").iterdir():
        part.unlink()
    assert "has no embeddings yet" in refused(tmp_path / "empty")
    assert open_dataset(tmp_path / "empty").record
