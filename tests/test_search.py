"""Search: exact, streamed, and embedded as the dataset was."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resfeat.backbones.weights import resolve
from resfeat.dataset import Dataset, Layout, Record
from resfeat.downstream import contact_sheet, embed_queries, search
from resfeat.downstream.search import Neighbour
from resfeat.errors import ResfeatError
from resfeat.spec import PIXEL_POLICY, FeatureSpec, SourceOptions

QUICK = ["--model", "resnet18", "--weights", "random:0", "--workers", 0,
         "--resize", 72, "--crop", 64]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 60), block=st.integers(1, 20), k=st.integers(1, 12), seed=st.integers(0))
def test_the_streamed_answer_is_that_of_all_cosines_at_once(rows, block, k, seed):
    chance = np.random.default_rng(seed % 2**32)
    vectors = chance.standard_normal((rows, 8)).astype(np.float32)
    queries = chance.standard_normal((3, 8)).astype(np.float32)
    vectors[0] = 0  # near to nothing, and no division by its length
    starts = range(0, rows, block)
    blocks = [(pa.array([str(i) for i in range(s, min(s + block, rows))]), vectors[s : s + block])
              for s in starts]  # fmt: skip
    found = search(SimpleNamespace(vectors=lambda layer: iter(blocks)), queries, k)

    lengths = np.linalg.norm(vectors, axis=1)
    lengths[0] = 1
    cosines = queries @ vectors.T / lengths / np.linalg.norm(queries, axis=1, keepdims=True)
    for row, nearest in zip(cosines, found, strict=True):
        expected = np.sort(row)[::-1][:k]
        assert np.allclose([neighbour.cosine for neighbour in nearest], expected, atol=1e-6)
        assert all(abs(row[int(n.id)] - n.cosine) < 1e-6 for n in nearest)


def test_equal_vectors_keep_the_order_of_the_plan():
    """Within a batch of rows, across batches, and where more are equal than are asked for."""
    vectors = np.eye(2, dtype=np.float32)[[1, 0, 1, 1, 0, 1]]
    blocks = [(pa.array(list("abc")), vectors[:3]), (pa.array(list("def")), vectors[3:])]
    for k, expected in (4, "acdf"), (3, "acd"), (6, "acdfbe"):
        rows = SimpleNamespace(vectors=lambda layer: iter(blocks))
        (found,) = search(rows, np.float32([[0, 1]]), k)
        assert "".join(each.id for each in found) == expected


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
    query = str(sorted((photos / "chelsea").iterdir())[0])
    told = rf"made with another pixel_policy \(0 there, {PIXEL_POLICY} now\): .* resfeat 0\.0\.9"
    with pytest.raises(ResfeatError, match=told):
        embed_queries(Dataset(Layout(tmp_path), older), [query])


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
    contact_sheet(["photos/cat.jpg"], [[Neighbour(long, 0.5), Neighbour("b.jpg", 0.25)]], {})
    assert captions == ["query\ncat.jpg", f"0.5000\n…{long[-23:]}", "0.2500\nb.jpg"]


def test_what_cannot_be_searched_is_one_line(dataset, photos, resfeat, tmp_path):
    def refused(*arguments, code=2):
        done = resfeat("search", *arguments)
        assert done.returncode == code and done.stdout == ""
        (line,) = done.stderr.strip().splitlines()
        return line

    query = sorted((photos / "chelsea").iterdir())[0]
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    assert "no resfeat dataset" in refused(tmp_path, query)
    assert "not_found" in refused(dataset, tmp_path / "no.jpg")
    assert "unidentified" in refused(dataset, query, tmp_path / "bad.jpg")
    assert "cannot write" in refused(dataset, query, "--sheet", tmp_path / "no" / "x.png", code=1)


def test_weights_that_have_changed_since_are_refused(photos, checkpoint, resfeat, tmp_path):
    import torch

    weights = tmp_path / "mine.pth"
    weights.write_bytes(checkpoint.read_bytes())
    options = ["--model", "resnet18", "--weights", weights, "--workers", 0]
    assert resfeat("extract", photos / "rocket", "-o", tmp_path / "out", *options).returncode == 0
    tensors = torch.load(weights, weights_only=True)
    torch.save({**tensors, "conv1.weight": tensors["conv1.weight"] * 2}, weights)
    done = resfeat("search", tmp_path / "out", sorted((photos / "rocket").iterdir())[0])
    assert done.returncode == 1
    assert "made with other weights" in done.stderr
