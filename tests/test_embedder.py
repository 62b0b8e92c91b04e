"""`Embedder`, `extract` by keyword, and what a dataset gives in a notebook."""

from __future__ import annotations

import inspect
import typing
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from command import share_ray
from PIL import Image, ImageOps
from small import write_pictures
from tables import rows, vectors

import resfeat
from resfeat import ExtractSpec, RuntimeOptions
from resfeat.errors import ResfeatError, UsageError
from resfeat.extraction import Options, Watching
from resfeat.keywords import EmbedderKeywords, ExtractKeywords
from resfeat.spec import FeatureSpec

SMALL = {"model": "cifar_resnet20", "weights": "random:0"}
WAYS = {
    "torch": {"runtime": "torch", "batch_size": 4, "layers": ["layer2", "avgpool"]},
    "openvino": {"runtime": "openvino", "batch_size": 3},
    "float16": {"runtime": "torch", "dtype": "float16", "decode": "pillow", "normalize": True},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """JPEGs and PNGs, one that is turned by its EXIF, one with alpha, a GIF. Not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = write_pictures(folder / "in", 6)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(paths[0]).convert("RGB").save(folder / "in" / "turned.jpg", exif=turned)
    Image.open(paths[1]).convert("RGB").save(folder / "in" / "large.webp", lossless=True)
    clear = Image.open(paths[2]).convert("RGBA")
    clear.putalpha(100)
    clear.save(folder / "in" / "clear.png")
    Image.open(paths[3]).convert("P").save(folder / "in" / "palette.gif")
    return folder / "in"


@pytest.fixture(scope="module", params=WAYS)
def made(request, pictures, tmp_path_factory):
    """A dataset of them."""
    output = tmp_path_factory.mktemp("made") / request.param
    report = resfeat.extract(pictures, output, workers=0, label_from="parent", **SMALL,
                             **WAYS[request.param])  # fmt: skip
    assert report.failed == 0
    return output


def same(given, expected):
    assert given.dtype == np.float32
    assert given.shape == expected.shape
    return np.array_equal(given.view(np.uint32), expected.view(np.uint32))


def test_whatever_holds_the_image_the_bits_are_those_of_the_dataset(made, pictures):
    dataset = resfeat.open_dataset(made)
    expected = np.concatenate([each for _, each in dataset.vectors()])
    paths = [pictures / name for name in dataset.ids()]
    with closing(resfeat.Embedder.of(made)) as embedder:
        assert same(embedder(paths), expected)
        assert same(embedder([path.read_bytes() for path in paths]), expected)
        assert same(embedder([Image.open(path) for path in paths]), expected)
        # Pixels are what a PNG of them is: of what was decoded, where that was without loss.
        whole = [n for n, path in enumerate(paths) if path.suffix != ".jpg"]
        opened = [Image.open(paths[n]) for n in whole]
        for image in opened:
            image.load()
        assert same(embedder(opened), expected[whole])
        plain = [n for n in whole if paths[n].suffix in (".png", ".webp")
                 and paths[n].stem != "clear"]  # fmt: skip
        arrays = [np.asarray(Image.open(paths[n]).convert("RGB")) for n in plain]
        assert same(embedder(arrays), expected[plain])
        assert same(embedder(np.stack(arrays)), expected[plain])
        # One alone has the bits that it has among others; and what was given stays as it was.
        assert same(embedder(str(paths[3])), expected[3:4])
        assert same(embedder(arrays[0]), expected[plain[:1]])
        assert opened[0].size == Image.open(paths[whole[0]]).size
        assert embedder([]).shape == (0, expected.shape[1])


def test_a_turned_image_is_shown_upright_before_and_after_pillow_has_decoded_it(pictures):
    with closing(resfeat.Embedder(**SMALL, decode="pillow", runtime="torch")) as embedder:
        image = Image.open(pictures / "turned.jpg")
        expected = embedder(image)
        image.load()
        assert same(embedder(image), expected)
        assert same(embedder(ImageOps.exif_transpose(image)), expected)
        assert not same(embedder(image.rotate(180)), expected)


def test_of_a_dataset_with_several_layers_one_is_given(pictures, tmp_path):
    out = tmp_path / "out"
    resfeat.extract(pictures, out, workers=0, **SMALL, **WAYS["torch"])
    table = rows(out)
    with closing(resfeat.Embedder.of(out, "layer2")) as embedder:
        given = embedder([pictures / name for name in table["id"].to_pylist()])
        expected = np.array(table["embedding_layer2"].to_pylist(), np.float32)
        assert same(given, expected)
    with pytest.raises(UsageError, match="no layer 'layer9'"):
        resfeat.Embedder.of(out, "layer9")


def test_what_gives_no_embedding_is_named(pictures, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    good = str(next(pictures.rglob("*.png")))
    with closing(resfeat.Embedder(**SMALL)) as embedder:
        for given, told in (
            ([good, str(tmp_path / "bad.jpg")], r"cannot embed .*bad\.jpg: unidentified"),
            (tmp_path / "no.jpg", r"no\.jpg: not_found"),
            (b"bad", "cannot embed an image: unidentified"),
            ([np.zeros((4, 4, 3))], r"float64 \[4, 4, 3\] is no picture: give uint8 \[H, W, 3\]"),
            (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\] is no picture"),
            ([7], "int is no picture"),
        ):
            with pytest.raises(UsageError, match=told):
                embedder(given)
        assert same(embedder(bytearray(Path(good).read_bytes())), embedder(good))
        path = next(pictures.rglob("*.png"))
        assert same(embedder.attempt(str(path))[0], embedder(path))
        with pytest.raises(UsageError, match="no column 'bytes', it has image: say which"):
            embedder({"image": np.array([good])})
    with pytest.raises(UsageError, match="calibrated"):
        resfeat.Embedder(**SMALL, precision="int8")
    with pytest.raises(UsageError, match="no keyword 'modle': did you mean 'model'"):
        resfeat.Embedder(modle="resnet18")
    with pytest.raises(UsageError, match=r"of\(\) has no keyword 'batchsize': .* 'batch_size'"):
        resfeat.Embedder.of("out", batchsize=3)


def test_what_is_no_name_of_weights_or_a_model_is_one_line(pictures, tmp_path):
    for keywords in ({"weights": None}, {"weights": 1}, {"model": None}):
        (name,) = keywords
        told = f"--{name} {keywords[name]}: give "
        with pytest.raises(UsageError, match=told):
            resfeat.Embedder(**keywords)
        with pytest.raises(UsageError, match=told):
            resfeat.extract(pictures, tmp_path / "out", **keywords)
        with pytest.raises(UsageError, match=told):
            ExtractSpec(sources=("in",), output="out", **keywords)


def test_a_value_that_is_not_finite_is_a_failure(pictures, monkeypatch):
    good = [str(path) for path in sorted(pictures.rglob("*.png"))[:3]]
    with closing(resfeat.Embedder(**SMALL)) as embedder:
        embed = embedder._worker.embed

        def broken(pixels):
            made = embed(pixels)
            made[1, 0] = np.inf
            return made

        monkeypatch.setattr(embedder._worker, "embed", broken)
        given, failures = embedder.attempt(good)
        assert np.isnan(given[1]).all() and np.isfinite(given[[0, 2]]).all()
        assert [each and each.reason for each in failures] == [None, "non_finite", None]


@pytest.mark.ray
def test_ray_data_takes_it_as_its_class(pictures, tmp_path):
    import ray

    share_ray()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.jpg").write_bytes(b"bad")
    how = {"runtime": "torch", "batch_size": 4}
    resfeat.extract(pictures, tmp_path / "out", workers=0, **SMALL, **how)
    expected = dict(zip(rows(tmp_path / "out")["id"].to_pylist(), vectors(rows(tmp_path / "out")),
                        strict=True))  # fmt: skip
    folders = [str(pictures), str(tmp_path / "bad")]
    images = ray.data.read_binary_files(folders, include_paths=True)
    embedded = images.map_batches(
        resfeat.Embedder,
        fn_constructor_kwargs={**SMALL, **how, "cpus_per_worker": 1},
        batch_size=5,
        concurrency=1,
    )
    found = {row["path"]: row for row in embedded.take_all()}
    assert len(found) == len(expected) + 1
    for path, row in found.items():
        if path.endswith("bad.jpg"):
            assert row["failure"].startswith("unidentified: ") and np.isnan(row["embedding"]).all()
        else:
            name = path.removeprefix(f"{pictures}/")
            assert row["failure"] == "" and same(row["embedding"], expected[name])


def test_extract_by_keyword_does_what_the_spec_does(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    steps = []
    options = {"crop": 40, "resize": 48, "normalize": True, "max_error_rate": 0.5}
    numbers = {"crop": np.int64(40), "max_error_rate": np.float32(0.5)}
    report = resfeat.extract("in", output=tmp_path / "a", workers=0, layers="avgpool",
                             on_step=steps.append, **SMALL, **(options | numbers))  # fmt: skip
    assert report.embedded == 10 and any(step.startswith("loading") for step in steps)
    spec = ExtractSpec(sources=("in",), output=str(tmp_path / "b"), layers=("avgpool",), **SMALL,
                       **options, runtime=RuntimeOptions(workers=0))  # fmt: skip
    resfeat.extract(spec)
    assert rows(tmp_path / "a").equals(rows(tmp_path / "b"))
    again = RuntimeOptions(workers=3, batch_size=2)
    report = resfeat.extract(["in"], tmp_path / "a", runtime=again, workers=0, layers=["avgpool"],
                             **SMALL, **options)  # fmt: skip
    assert report.images == 0
    for call, told in (
        (lambda: resfeat.extract("in", tmp_path / "c", modle="x"), "'modle': did you mean 'model'"),
        (lambda: resfeat.extract(spec, model="resnet18"), r"extract\(spec\) has no keyword"),
        (lambda: resfeat.extract("in"), "sources and an output"),
        (lambda: resfeat.extract(spec, tmp_path / "c"), "an ExtractSpec alone"),
        (lambda: resfeat.extract("in", tmp_path / "c", pool="mean"), "give one of avg, max, gem"),
        (lambda: resfeat.extract("in", tmp_path / "c", update="no"), "'no': give True or False"),
        (lambda: resfeat.extract("in", tmp_path / "c", workers="0"), "a whole number or None"),
        (lambda: resfeat.extract("in", tmp_path / "c", workers=True), "a whole number or None"),
        (lambda: resfeat.extract("in", tmp_path / "c", max_error_rate="a"), "'a': give a number"),
        (lambda: resfeat.extract("in", tmp_path / "c", partition=1), "1: give a string or None"),
        (lambda: resfeat.extract("in", tmp_path / "c", layers=5), "layers=5: give a name, or a"),
        (lambda: resfeat.extract(None, tmp_path / "c"), "None is no source: give a path"),
    ):
        with pytest.raises(UsageError, match=told):
            call()
    assert not (tmp_path / "c").exists()


def test_the_keywords_are_the_fields_of_the_specs_in_their_types():
    """But for those that are set by position, and those that take more than the spec does."""
    wider = {"weights", "layers", "keep", "runtime"}
    every = {}
    for spec in (RuntimeOptions, ExtractSpec):
        hints = typing.get_type_hints(spec)
        every |= {each.name: hints[each.name] for each in fields(spec)}
    del every["sources"], every["output"]
    given = typing.get_type_hints(ExtractKeywords)
    assert given.keys() == every.keys()
    assert {name: kind for name, kind in given.items() if name not in wider} == {
        name: kind for name, kind in every.items() if name not in wider
    }
    assert {each.name for each in fields(FeatureSpec)} <= EmbedderKeywords.__annotations__.keys()
    assert Options.__annotations__.keys() == given.keys() | Watching.__annotations__.keys()
    assert all(inspect.get_annotations(kind) for kind in (ExtractKeywords, Watching))


def test_a_dataset_in_a_notebook(pictures, tmp_path):
    out = tmp_path / "out"
    resfeat.extract(pictures, out, workers=0, label_from="parent", shard_size=3, **SMALL)
    dataset = resfeat.open_dataset(out)
    every = [
        (name.as_py(), row)
        for ids, some in dataset.vectors()
        for name, row in zip(ids, some, strict=True)
    ]
    ids = [name for name, _ in every]
    assert len(dataset.layout.committed()) == 4
    assert dataset.ids() == ids and dataset.dim() == 64
    assert dataset.labels() == [name.rpartition("/")[0] or "in" for name in ids]
    table = dataset.table()
    assert table["id"].to_pylist() == ids
    assert np.array_equal(vectors(table), [row for _, row in every])
    assert dataset.table(["width", "id"]).column_names == ["width", "id"]
    found = dataset.find([ids[7], "no", ids[1]])
    assert found.keys() == {ids[7], ids[1]} and np.array_equal(found[ids[7]], every[7][1])
    assert dataset.find(ids[1]).keys() == {ids[1]}
    near = resfeat.nearest(str(out), found[ids[1]], k=np.int64(2))
    assert near.ids[0][0] == ids[1]
    with pytest.raises(UsageError, match=r"-k 2\.5: give a whole number"):
        resfeat.nearest(dataset, found[ids[7]], k=2.5)
    with pytest.raises(UsageError, match=r"since=1: .* has had 0 updates"):
        dataset.changes(since=1)
    assert set(resfeat.__all__) <= set(dir(resfeat))

    examples = dataset.torch()
    assert examples.classes == sorted(set(dataset.labels())) and len(examples) == len(ids)
    vector, target = examples[5]
    assert torch.equal(vector, torch.from_numpy(every[5][1]))
    assert examples.classes[target] == dataset.labels()[5]
    batch, targets = next(iter(torch.utils.data.DataLoader(examples, batch_size=4)))
    assert batch.shape == (4, 64) and targets.dtype == torch.int64
    assert torch.equal(dataset.torch(label=None)[5], vector)
    with pytest.raises(UsageError, match=r"no column 'subject': give one of id, .*width"):
        dataset.labels("subject")

    near = resfeat.nearest(dataset, vector.numpy(), k=3)
    assert near.ids.shape == (1, 3) and near.ids[0, 0] == ids[5]
    with pytest.raises(UsageError, match=r"vectors of 3 numbers, and .* has 64"):
        resfeat.nearest(dataset, np.zeros((1, 3), np.float32))
    with pytest.raises(UsageError, match=r"float64 \[1, 64\] are no embeddings: give float32"):
        resfeat.nearest(dataset, np.zeros((1, 64)))
    with pytest.raises(UsageError, match="give one of cosine, l2"):
        resfeat.nearest(dataset, vector.numpy(), metric="dot")


def test_a_dataset_without_rows_or_labels_says_so(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.jpg").write_bytes(b"bad")
    resfeat.extract(tmp_path / "in", tmp_path / "out", workers=0, **SMALL)
    dataset = resfeat.open_dataset(tmp_path / "out")
    assert dataset.ids() == [] and dataset.find(["bad.jpg"]) == {}
    with pytest.raises(UsageError, match="no embeddings yet: see `resfeat status"):
        dataset.torch(label=None)
    with pytest.raises(UsageError, match=r"no column 'label' \(labels come with --label-from"):
        dataset.labels()
    assert resfeat.nearest(dataset, np.zeros((2, 64), np.float32)).ids.shape == (2, 0)


def test_weights_that_changed_since_are_not_taken(pictures, checkpoint, tmp_path):
    weights = tmp_path / "mine.pth"
    weights.write_bytes(checkpoint.read_bytes())
    how = {"model": "resnet18", "crop": 64, "resize": 64}
    resfeat.extract(pictures, tmp_path / "out", weights=weights, workers=0, **how)
    tensors = torch.load(weights, weights_only=True)
    torch.save({**tensors, "conv1.weight": tensors["conv1.weight"] * 2}, weights)
    with pytest.raises(ResfeatError, match="made with other weights"):
        resfeat.Embedder.of(tmp_path / "out")
