"""Search: exact, streamed, and embedded as the dataset was."""

import base64
import io
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from small import embed

import resfeat as package
from resfeat.backbones.weights import resolve
from resfeat.dataset import Dataset, Layout, Record, open_dataset
from resfeat.downstream import (
    Tile,
    check_place,
    contact_page,
    contact_sheet,
    write_document,
)
from resfeat.downstream.search import exact
from resfeat.errors import ResfeatError, UsageError
from resfeat.spec import PIXEL_POLICY, FeatureSpec, SourceOptions

# In their rooms the functions have these names.
decode_module = sys.modules["resfeat.decoding.decode"]
thumbnails = sys.modules["resfeat.downstream.pictures.thumbnails"]
QUICK = ["--model", "resnet18", "--weights", "random:0", "--workers", 0,
         "--resize", 72, "--crop", 64]  # fmt: skip


def parted(blocks):
    """A dataset of such parts, as search reads it. Ids count the rows."""
    starts = np.cumsum([0, *map(len, blocks)])

    def part(shard, rows, layer):
        for start in range(0, len(blocks[shard]), rows):
            some = blocks[shard][start : start + rows]
            first = int(starts[shard]) + start
            yield pa.array([str(first + n) for n in range(len(some))]), some

    layout = SimpleNamespace(committed=lambda: list(range(len(blocks))))
    return SimpleNamespace(layout=layout, part=part)


def by_all_pairs(vectors, queries, k, metric):
    """Scores and places of the nearest, in float64, with a full sort."""
    ours, theirs = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        near = -np.array([[np.sqrt(((q - x) ** 2).sum()) for x in theirs] for q in ours])
    else:
        lengths = [np.linalg.norm(each, axis=1) for each in (ours, theirs)]
        near = ours @ theirs.T / np.outer(*(np.where(each, each, 1) for each in lengths))
    order = np.argsort(-near, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(near, order, axis=1)
    return (scores if metric == "cosine" else -scores), order


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    rows=st.integers(1, 40),
    k=st.integers(1, 12),
    metric=st.sampled_from(["cosine", "l2"]),
    scale=st.sampled_from([1e-20, 1, 1e14, 1e16]),
    stretch=st.sampled_from([1, 1e12]),
    apart=st.sampled_from([1, 1e-4]),
    seed=st.integers(0, 2**32 - 1),
)
@example(sizes=[30, 30], rows=7, k=3, metric="l2", scale=1e14, stretch=1e12, apart=1, seed=0)
def test_the_streamed_answer_is_that_of_all_pairs_at_once(
    sizes, rows, k, metric, scale, stretch, apart, seed
):
    """Also where vectors are so alike, so long or so short that float32 cannot tell."""
    chance = np.random.default_rng(seed)
    middle = chance.standard_normal(8)
    some = middle + apart * chance.standard_normal((sum(sizes) + 3, 8))
    vectors, queries = np.split((scale * some).astype(np.float32), [sum(sizes)])
    vectors[::7] = 0  # near to nothing, and no division by its length
    queries[0] = vectors[-1] if len(vectors) else queries[0]
    queries[1:] *= stretch
    blocks = np.split(vectors, np.cumsum(sizes)[:-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "ROWS", rows)
        patch.setattr(exact, "QUERIES", 2)
        found = exact.scan(parted(blocks), queries, k, None, metric)

    scores, places = by_all_pairs(vectors, queries, k, metric)
    assert found.ids.shape == found.scores.shape == (3, min(k, len(vectors)))
    # In float64, sums of another order differ by so much.
    size = 1 if metric == "cosine" else max(scores.max(initial=0), 1e-30)
    assert np.allclose(found.scores, scores, rtol=1e-6, atol=1e-9 * size)
    differs = found.ids != places.astype(str)
    if differs.any():  # only among those that are equally near, to float64
        every, order = by_all_pairs(vectors, queries, len(vectors), metric)
        for row, column in np.argwhere(differs):
            place = list(order[row]).index(int(found.ids[row, column]))
            assert every[row, place] == pytest.approx(scores[row, column], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_equal_vectors_keep_the_order_of_the_plan(metric, monkeypatch):
    """Within some rows, across them and across parts that other threads read, and where more are
    equal than are asked for. Of a length at which float32's sums depend on the place in a batch."""
    monkeypatch.setattr(exact, "ROWS", 5)
    one, other = np.random.default_rng(0).standard_normal((2, 1001)).astype(np.float32)
    kinds = np.array([1, 0, 1, 1, 0, 1] * 6)
    vectors = np.where(kinds[:, None], one, other)
    blocks = np.split(vectors, [4, 11, 13, 30])
    for k in (1, 3, 20, 24, 36):
        found = nearest_of(blocks, one[None], k, metric)
        assert found.ids[0].tolist() == [*np.flatnonzero(kinds).astype(str),
                                         *np.flatnonzero(kinds == 0).astype(str)][:k]  # fmt: skip
        assert len(set(found.scores[0, : min(k, 24)])) == 1


def nearest_of(blocks, queries, k, metric):
    return exact.scan(parted(blocks), queries, k, None, metric)


def test_rows_that_come_nearer_and_nearer_are_compared_one_by_one_no_more_than_need_be(monkeypatch):
    """Each is nearer than all before it: a threshold alone would rule out none."""
    compared = []
    compare = exact._Nearest._compare
    monkeypatch.setattr(
        exact._Nearest, "_compare",
        lambda self, query, rows: (compared.append(len(rows)), compare(self, query, rows))[1],
    )  # fmt: skip
    angles = np.linspace(np.pi / 2, 0.1, 4000)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = nearest_of(np.split(vectors, 2), np.float32([[1, 0]]), 3, "cosine")
    assert found.ids.tolist() == [["3999", "3998", "3997"]]
    assert sum(compared) < 200


def test_pixels_that_are_made_otherwise_now_are_not_blamed_on_the_weights(photos, tmp_path):
    identity = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0")).identity
    older = Record(
        identity=replace(identity, pixel_policy="0"),
        weights="random:0",
        sources=(),
        source_options=SourceOptions(),
        plan=None,
        created="",
        versions={"resfeat": "0.0.9"},
    )
    told = rf"made with another pixel_policy \(0 there, {PIXEL_POLICY} now\): .* resfeat 0\.0\.9"
    with pytest.raises(ResfeatError, match=told):
        package.Embedder.of(Dataset(Layout(tmp_path), older))


@pytest.fixture(scope="module")
def dataset(photos, resfeat, tmp_path_factory):
    """Photographs of two subjects. Not to be changed."""
    output = tmp_path_factory.mktemp("search") / "out"
    sources = (photos / "chelsea", photos / "rocket")
    assert resfeat("extract", *sources, "-o", output, *QUICK).returncode == 0
    return output


def test_an_image_of_the_dataset_finds_itself_first(dataset, photos, resfeat):
    queries = [sorted((photos / name).iterdir())[3] for name in ("chelsea", "rocket")]
    done = resfeat("search", dataset, *queries, "-k", 4, "--json")
    assert done.returncode == 0, done.stderr
    for query, told in zip(queries, json.loads(done.stdout), strict=True):
        assert told["query"] == str(query)
        assert len(told["neighbours"]) == 4
        first, *others = told["neighbours"]
        assert first["id"] == f"{query.parent.name}/{query.name}"
        assert first["cosine"] == pytest.approx(1, abs=1e-5)
        assert all(other["id"].startswith(query.parent.name) for other in others)
        cosines = [neighbour["cosine"] for neighbour in told["neighbours"]]
        assert cosines == sorted(cosines, reverse=True)


def test_the_table_and_the_sheet(dataset, photos, resfeat, tmp_path):
    query = sorted((photos / "chelsea").iterdir())[0]
    done = resfeat("search", dataset, query, "-k", 5, "--sheet", tmp_path / "sheet.png")
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["rank", "cosine", "id"]
    assert lines[2].split() == ["1", "1.0000", f"chelsea/{query.name}"]
    assert lines[-1] == f"Picture: {tmp_path}/sheet.png"
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(query) as photo:
        assert sheet.width == 8 + 6 * 168
        # The query and its first neighbour are one picture, and it is this photograph.
        tiles = [np.asarray(sheet.crop((x, 8, x + 160, 168)), float) for x in (8, 176)]
        assert np.array_equal(*tiles)
        assert (
            np.abs(tiles[0].mean((0, 1)) - np.asarray(photo.convert("RGB")).mean((0, 1))).max() < 30
        )


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "page.html").write_text("old")
    link, pipe = tmp_path / "latest.html", tmp_path / "pipe"
    link.symlink_to("page.html")
    check_place(str(link))
    write_document(str(link), b"new")
    assert link.is_symlink() and (tmp_path / "page.html").read_text() == "new"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        check_place(str(pipe))
        write_document(str(pipe), b"told")
        assert reader.communicate(timeout=30)[0] == b"told"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_answers_are_not_lost_where_a_picture_cannot_be_drawn(dataset, resfeat, tmp_path):
    first = open_dataset(dataset).ids()[0]
    place = tmp_path / "sheet.jpg"  # of which no side has more than 65,535 pixels
    done = resfeat("search", dataset, *["--id", first] * 330, "-k", 1, "--sheet", place)
    assert done.returncode == 1 and not place.exists()
    assert done.stderr.splitlines()[-1].endswith("give a path that ends in .png")
    assert done.stdout.count(first) == 2 * 330


def test_odd_names_are_shown_and_change_no_terminal(resfeat, tmp_path):
    (tmp_path / "in").mkdir()
    odd = tmp_path / "in" / f"{'x' * 40}\x1b[31m.png"
    Image.new("RGB", (32, 32), "red").save(odd)
    quick = ["--model", "cifar_resnet20", "--weights", "random:0", "--workers", 0]
    assert resfeat("extract", tmp_path / "in", "-o", tmp_path / "out", *quick).returncode == 0
    done = resfeat("search", tmp_path / "out", odd)
    assert "1.0000" in done.stdout and "x[31m.png" in done.stdout.replace(r"\x1b", "")
    assert "\x1b" not in done.stdout.splitlines()[-1]


def test_a_caption_keeps_the_end_of_a_long_name(monkeypatch):
    captions = []
    monkeypatch.setattr(
        "PIL.ImageDraw.ImageDraw.multiline_text",
        lambda draw, place, text, *rest, **options: captions.append(text),
    )
    long = "a/folder/with/a/long/name/IMG_0001.jpg"
    contact_sheet([[Tile("query", "photos/cat.jpg", None), Tile("0.5000", long, None)]])
    assert captions == ["query\nphotos/cat.jpg", f"0.5000\n…{long[-23:]}"]


def told(done, code=0):
    assert done.returncode == code, done.stderr
    return {
        each["query"]: [tuple(near.values()) for near in each["neighbours"]]
        for each in json.loads(done.stdout)
    }


def test_files_folders_ids_and_vectors_ask_for_the_same(dataset, photos, resfeat, tmp_path):
    opened = open_dataset(dataset)
    ids = [name for name in opened.ids() if name.startswith("rocket")][:4]
    folder = tmp_path / "some" / "deeper"
    folder.mkdir(parents=True)
    for name in ids:
        (folder / name.replace("/", "-")).write_bytes((photos / name).read_bytes())
    found = opened.find(ids)
    np.save(tmp_path / "these.npy", np.stack([found[name] for name in ids]))
    np.save(tmp_path / "one.npy", found[ids[0]])
    for metric, name in (("cosine", "cosine"), ("l2", "distance")):
        ask = ["search", dataset, "-k", 3, "--json", "--metric", metric]
        by_file = told(resfeat(*ask, *(photos / name for name in ids)))
        assert list(by_file) == [str(photos / name) for name in ids]
        expected = list(by_file.values())
        assert [near[0] for near in expected] == [
            (n, 1.0 if metric == "cosine" else 0) for n in ids
        ]
        by_folder = told(resfeat(*ask, tmp_path / "some"))
        assert list(by_folder) == [str(folder / name.replace("/", "-")) for name in ids]
        assert list(by_folder.values()) == expected
        by_id = told(resfeat(*ask, *(word for name in ids for word in ("--id", name))))
        assert list(by_id.items()) == list(zip(ids, expected, strict=True))
        by_vector = told(
            resfeat(*ask, tmp_path / "these.npy", "--id", ids[1], tmp_path / "one.npy")
        )
        names = [f"{tmp_path}/these.npy[{n}]" for n in range(4)]
        assert list(by_vector) == [*names, f"{tmp_path}/one.npy[0]", ids[1]]
        assert list(by_vector.values()) == [*expected, expected[0], expected[1]]
        lines = resfeat(*ask[:4], "--metric", metric, "--id", ids[0]).stdout.splitlines()
        assert lines[:2] == [ids[0], f"  rank  {name}  id"] and lines[2].split()[2] == ids[0]


def test_an_id_whose_bytes_are_no_text_is_found_as_it_is_listed_or_not(resfeat, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (48, 32), (50, 100, 0)).save(tmp_path / "in" / name)
    embed(tmp_path / "out", tmp_path / "in")
    (by_name,) = told(resfeat("search", tmp_path / "out", "--id", name, "--json")).items()
    assert by_name == (r"caf\xe9.png", [(r"caf\xe9.png", 1.0)])
    done = resfeat("search", tmp_path / "out", "--id", os.fsdecode(b"the\xe9.png"))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert r"no embedding of the id 'the\xe9.png'" in line


def test_more_than_there_are_gives_what_there_is_and_says_so(dataset, resfeat):
    ids = open_dataset(dataset).ids()
    done = resfeat("search", dataset, "--id", ids[0], "-k", 5000, "--json")
    assert len(told(done)[ids[0]]) == len(ids)
    (line,) = done.stderr.splitlines()
    assert f"has {len(ids)} images, fewer than -k 5000" in line


def test_a_broken_file_of_a_folder_is_passed_over_and_told(dataset, photos, resfeat, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for n, photo in enumerate(sorted((photos / "chelsea").iterdir())[:2]):
        shutil.copy(photo, folder / f"{n}{photo.suffix}")
    expected = told(resfeat("search", dataset, folder, "-k", 2, "--json"))
    (folder / "0bad.jpg").write_bytes(b"bad")
    done = resfeat("search", dataset, folder, "-k", 2, "--json")
    assert done.returncode == 3 and told(done, code=3) == expected
    skipped, error = done.stderr.splitlines()
    assert skipped.startswith(f"Skipped, 1 so far: {folder / '0bad.jpg'}: unidentified, ")
    assert error == "Error: 1 of 3 images gave no embedding, more than 5%: see above"
    np.save(tmp_path / "v.npy", np.zeros((17, open_dataset(dataset).dim()), np.float32))
    others = tmp_path / "v.npy", "--id", open_dataset(dataset).ids()[0]  # no images to embed
    done = resfeat("search", dataset, folder, *others, "-k", 2, "--json")
    assert done.returncode == 3 and "1 of 3 images" in done.stderr
    for n in range(2, 19):  # of 20 images one is no more than 5 %
        shutil.copy(photo, folder / f"{n}{photo.suffix}")
    done = resfeat("search", dataset, folder, "-k", 2, "--json")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    done = resfeat("search", dataset, folder, folder / "0bad.jpg")  # which is asked for by itself
    assert done.returncode == 2 and done.stdout == ""


def test_what_cannot_be_searched_is_one_line(dataset, photos, resfeat, tmp_path):
    def refused(*arguments, code=2):
        done = resfeat("search", *arguments)
        assert done.returncode == code and done.stdout == ""
        (line,) = done.stderr.strip().splitlines()
        return line

    def saved(name, vectors):
        np.save(tmp_path / name, vectors)
        return tmp_path / name

    query = sorted((photos / "chelsea").iterdir())[0]
    bad, empty = tmp_path / "some" / "bad.jpg", tmp_path / "empty"
    bad.parent.mkdir()
    bad.write_bytes(b"bad")
    empty.mkdir()
    assert "no resfeat dataset" in refused(tmp_path, query)
    assert "not_found" in refused(dataset, tmp_path / "no.jpg")
    line = refused(dataset, query, bad)
    assert f"cannot embed {bad}: unidentified" in line and "; give another image, or" in line
    assert f"cannot embed {bad}: unidentified" in refused(dataset, bad.parent)
    (bad.parent / "two.jpg").write_bytes(b"")
    line = refused(dataset, bad.parent)
    assert f"none of the 2 images gives an embedding, the first is {bad}: unidentified" in line
    assert "; give others, or" in line
    assert "no images in" in refused(dataset, empty)
    assert "nothing to look for: name an image" in refused(dataset)
    assert "no embedding of the id 'no.jpg': ids stand in" in refused(dataset, "--id", "no.jpg")
    (tmp_path / "text.npy").write_text("no array")
    assert "no whole .npy of plain numbers): save float32" in refused(
        dataset, tmp_path / "text.npy"
    )
    short, wide = np.zeros((2, 3), np.float32), np.zeros((2, 512))
    odd = np.zeros((3, 512), np.float32)
    odd[1, 7] = np.nan
    assert "vectors of 3 numbers, and" in refused(dataset, saved("short.npy", short))
    assert "float64 [2, 512] are no embeddings" in refused(dataset, saved("wide.npy", wide))
    assert "vector 1 is not all finite" in refused(dataset, saved("odd.npy", odd))
    assert "no vectors are in it" in refused(dataset, saved("none.npy", odd[:0]))
    assert "no such file" in refused(dataset, tmp_path / "no.npy")
    (tmp_path / "text.npy").write_text("text")
    assert "with np.save" in refused(dataset, tmp_path / "text.npy")
    objects = np.array([{}], object)
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    assert "with np.save" in refused(dataset, tmp_path / "objects.npy")
    assert "no layer 'layer2'" in refused(dataset, query, "--layer", "layer2")
    # Said before anything is embedded: there is no such query.
    for where in (["--sheet", tmp_path / "no" / "x.png"], ["--html", tmp_path / "no" / "x.html"]):
        told = refused(dataset, tmp_path / "no.jpg", *where, code=1)
        assert told.endswith("its folder is not there; give another path")
    told = refused(dataset, tmp_path / "no.jpg", "--sheet", tmp_path / "x.odd", code=1)
    assert "give a path that ends in .png" in told
    failed = tmp_path / "failed"
    embed(failed, bad)
    assert "has no embeddings yet: see `resfeat status" in refused(failed, query)
    (bad.parent / "good.jpg").write_bytes(query.read_bytes())
    embed(tmp_path / "mixed", bad.parent)
    told = refused(tmp_path / "mixed", "--id", "bad.jpg")
    assert "no embedding of the id 'bad.jpg': the image failed, unidentified: " in told


@pytest.fixture(scope="module")
def lately(tmp_path_factory):
    """A dataset of three pictures, in a folder beside it. Not to be changed."""
    folder = tmp_path_factory.mktemp("lately")
    (folder / "in").mkdir()
    for n in range(3):
        Image.new("RGB", (48, 32), (50 * n, 100, 0)).save(folder / "in" / f"{n}.png")
    embed(folder / "out", folder / "in")
    return folder / "out"


@pytest.mark.parametrize(("option", "name"), [("--html", "x.html"), ("--sheet", "x.png")])
def test_what_cannot_be_written_whole_leaves_what_was_there(
    option, name, lately, resfeat, tmp_path
):
    (tmp_path / name).write_bytes(b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as on a disk without more room
    try:
        done = resfeat("search", lately, "--id", "1.png", option, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1 and f"cannot write {tmp_path / name}" in done.stderr
    assert (tmp_path / name).read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert resfeat("search", lately, "--id", "1.png", option, tmp_path / name).returncode == 0
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("way", ["sheet", "page", "thumbnails"])
def test_small_pictures_are_drawn_as_there_is_memory_for_them(way, lately, monkeypatch):
    """Of large images as many at a time as fit, whoever draws them; all of them in the end."""
    at_once, most, lock = [0], [0], threading.Lock()

    def decoding(data, image, preprocessing, how, do=decode_module._by_pillow):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1
        return do(data, image, preprocessing, how)

    monkeypatch.setattr(decode_module, "_by_pillow", decoding)
    item = open_dataset(lately).items(["1.png"])["1.png"]
    names = [str(n) for n in range(12)]

    def draw():
        most[0] = 0
        rows = [[Tile("", name, item) for name in names]]
        if way == "sheet":
            return np.asarray(contact_sheet(rows))[8:168, 8:168].tobytes()
        if way == "page":
            return re.findall('base64,[^"]*', contact_page(rows, "", ""))
        return list(thumbnails.thumbnails(names, dict.fromkeys(names, item)).values())

    whole = draw()
    assert most[0] > 2
    pixels = 48 * 32
    monkeypatch.setattr(thumbnails, "memory_bytes", lambda: 2 * 16 * (2 * pixels + 1))
    assert draw() == whole and most[0] <= 2
    monkeypatch.setattr(thumbnails, "memory_bytes", lambda: 2 * 16)  # alone, as in an extraction
    assert draw() == whole and most[0] == 1


def test_the_memory_of_large_pictures_is_given_back(lately, monkeypatch):
    """What the C library keeps for each thread is as much as all of them would take at once."""
    given, item = [], open_dataset(lately).items(["1.png"])["1.png"]
    monkeypatch.setattr(thumbnails, "_give_back", lambda: given.append(1))
    names = [str(n) for n in range(12)]
    thumbnails.thumbnails(names, dict.fromkeys(names, item))
    assert given == []
    monkeypatch.setattr(thumbnails, "LARGE", 48 * 32)
    thumbnails.thumbnails(names, dict.fromkeys(names, item))
    assert len(given) == 12


def test_a_picture_of_too_many_tiles_is_one_line():
    rows = [[Tile("", "x", None)] * 11] * 1000
    with pytest.raises(UsageError, match=r"1,856 x 200,008 pixels is too large: give fewer"):
        contact_sheet(rows)


class Seen(HTMLParser):
    """What a browser would make of a page: its tags, in order, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_and_runs_nothing_of_a_name(resfeat, tmp_path):
    (tmp_path / "in").mkdir()
    odd = ["<script>alert(1)<", "x' onerror='alert(1)", 'y" onload="alert(1)', "&lt;b&gt;{style}",
           "\x1b[31m\u202ered"]  # fmt: skip
    for n, name in enumerate(odd):
        Image.new("RGB", (48, 32), (50 * n, 100, 0)).save(tmp_path / "in" / f"{name}.png")
    embed(tmp_path / "out", tmp_path / "in")
    page = tmp_path / "near.html"
    done = resfeat("search", tmp_path / "out", tmp_path / "in", "-k", 5, "--html", page)
    assert done.returncode == 0 and done.stdout.endswith(f"Page: {page}\n")
    assert "\x1b" not in done.stdout
    text = page.read_text()
    seen = Seen(text)
    assert {tag for tag, _ in seen.tags} == set(
        "html head meta title style body h1 p section figure img figcaption b bdi".split()
    )
    pictures = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert len(pictures) == 5 * 6
    assert {name for each in pictures for name in each} == {"src", "width", "height", "alt"}
    assert all(each["src"].startswith("data:image/jpeg;base64,") for each in pictures)
    first = Image.open(io.BytesIO(base64.b64decode(pictures[0]["src"].partition(",")[2])))
    assert first.size == (160, 160)
    names = {each["alt"] for each in pictures}
    for name in odd[:4]:
        assert f"{name}.png" in names and f"{name}.png" in seen.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert not re.search(r"https?:|//|url\(", re.sub('base64,[^"]*', "", text))
    for needed in ("prefers-color-scheme: dark", 'name="viewport"', "default-src 'none'"):
        assert needed in text


def test_weights_that_have_changed_since_are_refused(photos, checkpoint, resfeat, tmp_path):
    import torch

    weights = tmp_path / "mine.pth"
    weights.write_bytes(checkpoint.read_bytes())
    options = ["--model", "resnet18", "--weights", weights, "--workers", 0, "--runtime", "torch",
               "--resize", 36, "--crop", 32]  # fmt: skip
    assert resfeat("extract", photos / "rocket", "-o", tmp_path / "out", *options).returncode == 0
    tensors = torch.load(weights, weights_only=True)
    torch.save({**tensors, "conv1.weight": tensors["conv1.weight"] * 2}, weights)
    done = resfeat("search", tmp_path / "out", sorted((photos / "rocket").iterdir())[0])
    assert done.returncode == 1
    assert "made with other weights" in done.stderr
