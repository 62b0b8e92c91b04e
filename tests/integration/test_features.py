"""The choices that decide what an embedding is, by the command: made, recorded, kept, refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from command import error_of
from later import Later
from tables import rows, vectors

from resfeat import open_dataset
from resfeat.backbones.ours import BACKBONES
from resfeat.cli import main
from resfeat.fidelity.parity import cosine

duckdb = Later("duckdb")
pd = Later("pandas")
pl = Later("polars")

CHOICES = ["--model", "resnet18", "--weights", "random:0", "--resize", "72", "--crop", "64"]


@pytest.fixture(scope="module")
def folder(photos, once) -> Path:
    """A dozen photographs. Not to be changed."""
    return once("dozen", lambda folder: _link(sorted((photos / "coffee").iterdir())[:12], folder))


def _link(photos, folder) -> Path:
    for photo in photos:
        (folder / photo.name).hardlink_to(photo)
    return folder


def run(resfeat, folder, output, *choices, workers=0):
    done = resfeat("extract", folder, "-o", output, "--workers", workers, *CHOICES, *choices)
    assert done.returncode == 0, done.stderr
    return done


def column(table, name):
    flat = table[name].combine_chunks().flatten().to_numpy().astype(np.float32)
    return flat.reshape(len(table), -1)


def metadata(output):
    part = next((output / "embeddings").iterdir())
    return json.loads(pq.read_schema(part).metadata[b"resfeat"])


def report(output):
    return json.loads(next((output / "_resfeat" / "runs").iterdir()).read_text())


@pytest.fixture(scope="module")
def plain(folder, extracted):
    """The photographs as they are embedded by default. Not to be changed."""
    return extracted("plain", folder, "--workers", 0, *CHOICES)


@pytest.fixture
def first(folder, tmp_path):
    """So many of the photographs: without instructions for bf16 each takes seconds in it."""

    def link(count) -> Path:
        (tmp_path / "first").mkdir()
        return _link(sorted(folder.iterdir())[:count], tmp_path / "first")

    return link


def test_several_layers_are_a_column_each(folder, plain, resfeat, tmp_path):
    output = tmp_path / "out"
    run(resfeat, folder, output, "--layers", "avgpool,layer2")
    table = rows(output)
    assert table.schema.names[:3] == ["id", "embedding_layer2", "embedding_avgpool"]
    assert column(table, "embedding_layer2").shape == (len(table), 128)
    # One pass for both does not change a bit of either.
    assert np.array_equal(column(table, "embedding_avgpool"), vectors(rows(plain)))
    assert metadata(output)["layers"] == ["layer2", "avgpool"]

    query = next(folder.iterdir())
    for layer, wanted in ((None, "embedding_avgpool"), ("layer2", "embedding_layer2")):
        option = ["--layer", layer] if layer else []
        found = resfeat("search", output, query, "-k", 1, "--json", *option)
        (best,) = json.loads(found.stdout)[0]["neighbours"]
        assert best["id"] == query.name and best["cosine"] > 0.9999
        ids, given = next(open_dataset(output).vectors(layer=layer))
        assert np.array_equal(given, column(table, wanted)[: len(ids)])
    missing = resfeat("search", output, query, "--layer", "layer3")
    assert missing.returncode == 2 and "no layer 'layer3'" in missing.stderr


def test_unit_length_half_size_values_in_every_reader(folder, plain, resfeat, tmp_path):
    output = tmp_path / "out"
    run(resfeat, folder, output, "--normalize", "--dtype", "float16", "--pool", "max")
    table = rows(output)
    assert table.schema.field("embedding").type.value_type == pa.float16()
    given = column(table, "embedding")
    assert np.linalg.norm(given, axis=1) == pytest.approx(1, abs=2e-3)
    told = metadata(output)
    assert (told["normalize"], told["dtype"], told["pool"]) == (True, "float16", "max")
    assert cosine(given, vectors(rows(plain))).max() < 0.9999  # a maximum is no mean

    parts = output / "embeddings"
    first = given[0]
    for read in (
        lambda: pd.read_parquet(parts).sort_values("id")["embedding"].iloc[0],
        lambda: pl.read_parquet(parts / "*.parquet").sort("id")["embedding"][0].to_numpy(),
        lambda: duckdb.sql(f"select embedding from '{parts}/*.parquet' order by id").fetchall()[0][
            0
        ],
    ):
        assert np.array_equal(np.asarray(read(), np.float32), first)
    query = sorted(folder.iterdir())[0]
    found = resfeat("search", output, query, "-k", 1, "--json")
    assert json.loads(found.stdout)[0]["neighbours"][0]["cosine"] > 0.9999


def test_one_value_that_float16_cannot_hold_is_a_failure_among_others(
    first, checkpoint, resfeat, tmp_path
):
    import torch

    folder = first(8)

    def seventh(scale, dtype):
        """Extract by weights that scale one value of each vector, in batches of four."""
        tensors = torch.load(checkpoint, weights_only=True)
        tensors["layer4.1.bn2.weight"][7] *= scale
        tensors["layer4.1.bn2.bias"][7] *= scale
        torch.save(tensors, tmp_path / "scaled.pth")
        output = tmp_path / dtype
        done = resfeat("extract", folder, "-o", output, "--workers", 0, *CHOICES,
                       "--weights", tmp_path / "scaled.pth", "--dtype", dtype, "--runtime", "torch",
                       "--batch-size", 4, "--max-error-rate", 1)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return output

    # What the network adds to the value beside is small against a million times itself.
    large = rows(seventh(1e6, "float32"))
    values = dict(zip(large["id"].to_pylist(), vectors(large)[:, 7] / 1e6, strict=True))
    smaller, larger = sorted(values.values())[3:5]
    output = seventh(65504 / ((smaller + larger) / 2), "float16")
    failed = rows(output, "failures")
    assert set(failed["reason"].to_pylist()) == {"non_finite"}
    too_large = {name for name, value in values.items() if value >= larger}
    assert set(failed["id"].to_pylist()) == too_large and len(too_large) == 4
    assert set(rows(output)["id"].to_pylist()) == values.keys() - too_large
    assert np.isfinite(column(rows(output), "embedding")).all()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.more)])
def test_half_precision_is_compared_first_and_recorded(workers, first, plain, resfeat, tmp_path):
    output = tmp_path / "out"
    done = run(resfeat, first(4), output, "--precision", "bf16", workers=workers)
    assert " against fp32 on torch, 4 of the images: cosine 0.9999" in done.stderr
    parity = report(output)["parity"]
    assert set(parity) == {"images", "minimum", "median"}
    assert 0.9999 < parity["minimum"] <= parity["median"] <= 1
    assert metadata(output)["parity"] == parity
    assert json.loads((output / "_resfeat" / "spec.json").read_text())["parity"] == parity
    assert metadata(plain)["parity"]["minimum"] > 0.999999  # OpenVINO in fp32
    cosines = cosine(vectors(rows(output)), vectors(rows(plain))[:4])
    assert 0.9999 < cosines.min() < 1
    assert json.loads(resfeat("status", output, "--json").stdout)["parity"] == parity


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.more)])
def test_too_little_parity_stops_before_anything_is_written(workers, first, resfeat, tmp_path):
    output = tmp_path / "out"
    done = resfeat("extract", first(4), "-o", output, "--workers", workers, *CHOICES,
                   "--precision", "bf16", "--min-parity", 1)  # fmt: skip
    assert done.returncode == 1
    assert "under --min-parity 1: use --precision fp32" in done.stderr.splitlines()[-1]
    assert not output.exists()


def test_a_resume_with_other_pixels_is_refused_and_says_which(folder, plain, resfeat, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(plain, output)
    for option, value in (("--crop", 48), ("--resize", 80), ("--interpolation", "bicubic")):
        done = resfeat("extract", folder, "-o", output, "--workers", 0, *CHOICES, option, value)
        assert done.returncode == 2
        assert f"was made with another {option[2:]}: " in done.stderr
        assert f"there, {value} now" in done.stderr


def test_other_pixels_give_another_fingerprint_and_are_used(folder, plain, resfeat, tmp_path):
    output = tmp_path / "out"
    pixels = ["--resize", 56, "--crop", 48, "--interpolation", "nearest"]
    run(resfeat, folder, output, *pixels)
    told = metadata(output)
    assert told["fingerprint"] != metadata(plain)["fingerprint"]
    preprocessing = told["preprocessing"]
    assert [preprocessing[name] for name in ("resize", "crop", "interpolation")] == [
        56,
        48,
        "nearest",
    ]
    query = sorted(folder.iterdir())[0]
    found = resfeat("search", output, query, "-k", 1, "--json")
    assert json.loads(found.stdout)[0]["neighbours"][0]["cosine"] > 0.9999


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
@pytest.mark.parametrize("command", ["extract", "bench"])
def test_what_is_not_installed_is_one_line_before_any_work(
    command, missing, folder, tmp_path, monkeypatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    output = ["-o", str(tmp_path / "out"), "--workers", "0"] if command == "extract" else []
    done = CliRunner().invoke(
        main, [command, str(folder), *output, *CHOICES, "--precision", "int8"]
    )
    assert done.exit_code == 2
    line = error_of(done.stderr)
    assert line == (
        f"Error: --precision int8 needs {missing}, which is not installed: "
        "pip install 'resfeat[int8]'"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        (["--layers", "layer9"], "has no layer 'layer9': give some of stem, layer1"),
        (["--layers", ","], "--layers has an empty name"),
        (["--model", "cifar_resnet20", "--layers", "layer4"], "has no layer 'layer4'"),
        (["--precision", "int8", "--runtime", "torch"], "--runtime torch has no int8"),
        (["--precision", "fp16", "--runtime", "openvino"], "--runtime openvino has no fp16"),
        (["--precision", "int8", "--gpus-per-worker", "1"], "--precision int8 is for CPUs"),
        (["--crop", "300"], "a crop of 300 pixels is larger than the resize to 72"),
        (["--resize", "0"], "--resize 0: give 1 to 4096 pixels"),
        (["--min-parity", "2"], "--min-parity 2: give a cosine"),
        (["--model", "torchvision:alexnet", "--pool", "max"], "pools in its own way"),
        (["--model", "plain18", "--weights", "DEFAULT"], "nobody publishes weights for plain18"),
    ],
)  # fmt: skip
def test_choices_that_cannot_be_are_one_line(choices, told, folder, tmp_path):
    command = ["extract", str(folder), "-o", str(tmp_path / "out"), "--workers", "0"]
    done = CliRunner().invoke(main, [*command, *CHOICES, *choices])
    assert done.exit_code == 2
    line = error_of(done.stderr)
    assert told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.more
@pytest.mark.ray
def test_a_network_of_another_library_on_ray(folder, resfeat, tmp_path):
    choices = [*CHOICES, "--model", "torchvision:squeezenet1_1"]
    for workers in (0, 1):
        done = resfeat(
            "extract", folder, "-o", tmp_path / str(workers), "--workers", workers, *choices
        )
        assert done.returncode == 0, done.stderr
    given, expected = (vectors(rows(tmp_path / str(workers))) for workers in (1, 0))
    assert given.shape[1] == 512 and np.array_equal(given, expected)


def test_notes_of_a_checkpoint_are_said_and_recorded(folder, checkpoint, resfeat, tmp_path):
    import torch

    tensors = torch.load(checkpoint, weights_only=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "w.pth")
    command = ["extract", folder, "-o", tmp_path / "out", "--workers", 0, *CHOICES,
               "--weights", tmp_path / "w.pth"]  # fmt: skip
    done = resfeat(*command)
    note = f"weights {tmp_path / 'w.pth'}: took 'state_dict', stripped 'module.' from the names"
    assert f"Note: {note}" in done.stderr
    assert report(tmp_path / "out")["notes"] == [note]
    again = resfeat(*command, "--log-json")
    events = map(json.loads, again.stdout.splitlines())
    assert note in [each["text"] for each in events if each["event"] == "note"]


def test_models_lists_and_shows(resfeat):
    listed = resfeat("models").stdout.splitlines()
    assert any(line.split()[:4] == ["resnet50", "2,048", "23,508,032", "4.09"] for line in listed)
    assert len(listed) > len(BACKBONES)
    shown = resfeat("models", "resnet50").stdout
    assert "layer3      1024 x 14 x 14" in shown
    assert "IMAGENET1K_V2     resize 232, crop 224, bilinear" in shown
    (row,) = json.loads(resfeat("models", "torchvision:vit_b_16", "--json").stdout)
    assert (row["dimension"], row["input"], row["default"]) == (768, 224, "IMAGENET1K_V1")
    (row,) = json.loads(resfeat("models", "timm:resnet10t", "--json").stdout)
    assert (row["dimension"], row["default"]) == (512, "c3_in1k")
    some = resfeat("models", "timm:vit_base_patch16_clip_*", "--json")
    assert len(json.loads(some.stdout)) >= 3
    missing = resfeat("models", "resnet5*0*0")
    assert missing.returncode == 2 and "see `resfeat models`" in missing.stderr
