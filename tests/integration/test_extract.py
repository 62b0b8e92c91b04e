"""The main job on 500 real photographs with a dozen broken files among them."""

import json
import os
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from broken import EXPECTED
from PIL import Image
from reference import reference_embeddings
from tables import rows, vectors

PHOTOS = 500


def test_every_file_is_exactly_one_row(inline, collection):
    listed = {str(p.relative_to(collection)) for p in collection.rglob("*") if not p.is_dir()}
    embedded = rows(inline)["id"].to_pylist()
    failed = rows(inline, "failures")["id"].to_pylist()
    counts = Counter(embedded + failed)
    assert set(counts) == listed
    assert set(counts.values()) == {1}
    assert (len(embedded), len(failed)) == (PHOTOS, len(EXPECTED))


def test_failures_say_what_is_wrong(inline, collection):
    failures = rows(inline, "failures").to_pylist()
    given = {row["id"].rpartition("/")[2]: (row["stage"], row["reason"]) for row in failures}
    assert given == EXPECTED
    assert all(row["message"] for row in failures)
    assert all(row["uri"] == (collection / row["id"]).as_uri() for row in failures)


@pytest.fixture(scope="module")
def of_usual_size(photos, choices, once, extracted):
    """Some of the photographs, with the pixels of the published weights, by the usual runtime."""

    def write(folder):
        for photo in sorted((photos / "flower").iterdir())[:25]:
            os.link(photo, folder / photo.name)

    source = once("flowers", write)
    options = [*choices, "--resize", 256, "--crop", 224, "--runtime", "auto", "--workers", 0]
    return extracted("of-usual-size", source, *options), source, {}


@pytest.fixture(scope="module")
def of_small_size(inline, collection):
    return inline, collection, {"resize_size": 36, "crop_size": 32}


@pytest.mark.parametrize("size", ["of_usual_size", "of_small_size"])
def test_embeddings_are_those_of_an_independent_script(size, checkpoint, request):
    output, source, pixels = request.getfixturevalue(size)
    table = rows(output)
    some = slice(None, None, max(1, len(table) // 25))
    paths = [source / name for name in table["id"].to_pylist()[some]]
    assert len(paths) >= 25
    expected = reference_embeddings("resnet18", checkpoint, paths, **pixels)
    given = vectors(table)[some]
    cosines = (expected * given).sum(1)
    cosines /= np.linalg.norm(expected, axis=1) * np.linalg.norm(given, axis=1)
    assert cosines.min() >= 0.9999
    # Same pixels, same weights: what is left is the order of float32 additions.
    assert np.abs(expected - given).max() <= 1e-5 * np.abs(expected).max()


def test_the_other_columns(inline, collection):
    for row in rows(inline).to_pylist()[::40]:
        path = collection / row["id"]
        with Image.open(path) as image:
            assert (row["width"], row["height"]) == image.size
        assert row["size"] == path.stat().st_size
        assert row["mtime"].timestamp() * 1e6 == path.stat().st_mtime_ns // 1000
        assert row["label"] == path.parent.name == "deeper"


@pytest.mark.ray
def test_two_ray_workers_give_the_same_bits(original, undisturbed, choices, resfeat, tmp_path):
    output = tmp_path / "out"
    done = resfeat("extract", original, "-o", output, "--workers", 2, *choices,
                   "--shard-size", 32, "--max-error-rate", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in ("embeddings", "failures"):
        ours = sorted((output / kind).iterdir())
        theirs = sorted((undisturbed / kind).iterdir())
        assert [path.name for path in ours] == [path.name for path in theirs]
        assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    (report,) = (output / "_resfeat" / "runs").iterdir()
    engine = json.loads(report.read_text())["engine"]
    assert (engine["engine"], engine["workers"]) == ("ray", 2)


def test_the_report_and_the_last_lines(inline, collection, choices, resfeat, tmp_path):
    (path,) = (inline / "_resfeat" / "runs").glob("*.json")
    report = json.loads(path.read_text())
    assert report["status"] == "finished"
    assert (report["items"], report["embedded"], report["failed"]) == (512, 500, 12)
    assert (report["images"], report["images_failed"], report["shards_left"]) == (512, 12, 0)
    assert report["reasons"] == Counter(reason for _, reason in EXPECTED.values())
    assert set(report["stages"]) == {"read", "decode", "wait", "embed", "write"}
    assert report["bottleneck"] in ("read", "decode", "embed", "write")
    assert report["images_per_second"] > 0
    assert report["hardware"]["cpus"] >= 1 and "torch" in report["versions"]

    output = tmp_path / "out"
    shutil.copytree(inline, output)
    again = resfeat("extract", collection, "-o", output, "--workers", 0, *choices)
    assert again.returncode == 0
    lines = again.stdout.splitlines()
    assert lines[0].startswith("This run: nothing was left to do; --update looks for")
    assert lines[-1] == f"Finished: 500 embedded and 12 failed of 512 images in {output}"
    assert f"see {output}/failures" in lines[-2]


def test_a_part_says_what_its_embeddings_are(inline, checkpoint):
    part = next((inline / "embeddings").iterdir())
    told = json.loads(pq.read_schema(part).metadata[b"resfeat"])
    spec = json.loads((inline / "_resfeat" / "spec.json").read_text())
    assert told.pop("fingerprint") == spec["fingerprint"]
    assert told == spec["identity"]
    assert spec["weights"] == str(checkpoint)


def test_too_many_failures_is_exit_code_3(tmp_path, resfeat):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    command = ["extract", tmp_path / "in", "-o", tmp_path / "out", "--model", "cifar_resnet20",
               "--weights", "random:0", "--workers", 0, "--runtime", "torch"]  # fmt: skip
    done = resfeat(*command)
    assert done.returncode == 3
    assert "50.0% of the images failed, more than --max-error-rate 5.0%" in done.stderr
    assert "1 embedded and 1 failed of 2 images" in done.stdout
    assert resfeat(*command, "--max-error-rate", 0.5).returncode == 0


@pytest.mark.parametrize("what", ["size", "time"])
def test_a_file_that_changed_after_it_was_listed_is_noticed(what, tmp_path, monkeypatch):
    import resfeat
    from resfeat import engines

    picture = tmp_path / "in" / "1.png"
    picture.parent.mkdir()
    Image.new("RGB", (64, 64)).save(picture)
    start = engines.start

    def rewritten_first(*args):
        if what == "size":
            Image.new("RGB", (32, 32)).save(picture)
        os.utime(picture, (1, 1))
        return start(*args)

    monkeypatch.setattr(engines, "start", rewritten_first)
    spec = resfeat.ExtractSpec(
        sources=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        runtime=resfeat.RuntimeOptions(workers=0, runtime="torch"),
    )
    report = resfeat.extract(spec)
    assert (report.changed, report.failed) == (1, 0)
    (row,) = resfeat.open_dataset(tmp_path / "out").embeddings.to_table().to_pylist()
    assert row["width"] == (32 if what == "size" else 64)
    assert (row["size"], row["mtime"].timestamp()) == (picture.stat().st_size, 1)
