"""The pipelines that train networks, with few pictures and small ones."""

import json
import re
import sys
import tempfile

import degradation
import numpy as np
import pytest
import torch
import transfer
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from resfeat import Embedder, open_dataset
from resfeat.backbones.weights import resolve
from resfeat.errors import ResfeatError
from resfeat.sources import listing
from resfeat.spec import FeatureSpec, SourceOptions

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, CLASSES, EACH = "cifar_resnet20", (1, 3, 5, 8, 9), 20
# Of the table of degradation.py: network, parameters, training error, test error.
ROW = r"^\| (\S+) \| ([\d,]+) \| (\S+)% \| (\S+)% \|"
TRANSFER = ["--model", MODEL, "--weights", "random:0"]


def run(pipeline, *arguments):
    return CliRunner().invoke(pipeline.main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def digits(once):
    """Twenty each of some handwritten digits, in a folder each."""

    def write(folder):
        from sklearn.datasets import load_digits

        there = load_digits()
        for digit in CLASSES:
            (folder / str(digit)).mkdir()
            for number in np.flatnonzero(there.target == digit)[:EACH]:
                pixels = (there.images[number] * 15.9).astype(np.uint8)
                Image.fromarray(pixels).save(folder / str(digit) / f"{number:04}.png")

    return once("digits", write)


def test_transfer_ends_with_weights_that_extract_takes_and_a_better_probe(
    digits, tmp_path, resfeat
):
    tuned = tmp_path / "tuned.safetensors"
    done = run(transfer, digits, *TRANSFER, "-o", tuned, "--epochs", 6)
    assert done.exit_code == 0, done.output
    assert "100 images: running cifar_resnet20 up to layer2" in done.stdout
    assert "80 images to learn from, 20 held out" in done.stdout
    losses = [float(each) for each in re.findall(r"loss (\S+),", done.stdout)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    right = [int(each) for each in re.findall(r"(\d+) of 20 +\d", done.stdout)]
    assert len(right) == 3 and right[2] >= right[0]

    before, after = resolve(FeatureSpec(model=MODEL, weights="random:0")).tensors, load_file(tuned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("layer3.")} - {
        name for name in before if "running" in name
    }

    tops, vectors = [], []
    for weights in ("random:0", tuned):
        out = tmp_path / f"of-{len(tops)}"
        resfeat("extract", digits, "-o", out, "--model", MODEL, "--weights", weights,
                "--label-from", "parent", "--workers", 0, "--runtime", "torch")  # fmt: skip
        vectors.append(np.concatenate([each for _, each in open_dataset(out).vectors()]))
        told = json.loads(resfeat("probe", out, "--folds", 4, "--json").stdout)
        tops += [each["top1"] for each in told["scores"] if each["classifier"] != "k-NN (5)"]
    assert not np.allclose(*vectors, rtol=0.001)
    assert tops[1] >= tops[0] > 0.5


def test_the_last_stage_sees_what_extract_would_show_it(digits, tmp_path):
    items = list(listing([str(digits)], SourceOptions(label_from="parent")))[::9]
    weights = resolve(FeatureSpec(model=MODEL, weights="random:0"))
    network = transfer.network_of(weights)
    with open(tmp_path / "maps", "wb") as file:
        read, shape = transfer.run_once(network, weights, items, file)
    assert read == items and shape == (32, 16, 16)
    maps = np.fromfile(tmp_path / "maps", np.float32).reshape(len(items), *shape)
    with torch.inference_mode():
        vectors = network.layer3(torch.from_numpy(maps)).mean(dim=(2, 3)).numpy()
    embed = Embedder(model=MODEL, weights="random:0", runtime="torch")
    np.testing.assert_allclose(vectors, embed(items), rtol=1e-4, atol=1e-6)


def test_the_room_for_maps_is_told_before_any_is_written(digits, capsys):
    items = list(listing([str(digits)], SourceOptions(label_from="parent")))
    weights = resolve(FeatureSpec(model=MODEL, weights="random:0"))
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(ResfeatError, match="set TMPDIR to a folder that has room"),
    ):
        transfer.run_once(transfer.network_of(weights), weights, items, full)
    told = f"their maps: 3 MB, for now in {tempfile.gettempdir()} (TMPDIR)"  # 32 x 16 x 16 each
    assert told in capsys.readouterr().out


def test_of_each_class_a_share_is_held_out_and_one_image_at_least():
    listed = [("cat", 10), ("dog", 2), ("cow", 1)]
    items = [
        transfer.Item(f"{name}/{n}", "", 1, 1, label=name)
        for name, count in listed for n in range(count)
    ]  # fmt: skip
    images = transfer.split(items, np.zeros((13, 1)), 0.2, seed=0)
    assert images.classes == ("cat", "dog")
    labels = [[items[row].label for row in rows] for rows in (images.learned, images.held)]
    assert labels == [["cat"] * 8 + ["dog"], ["cat"] * 2 + ["dog"]]
    assert sorted([*images.learned, *images.held]) == [*range(12)]


def test_transfer_leaves_out_what_it_cannot_use_and_says_so(digits, tmp_path):
    for digit in CLASSES[:2]:
        (tmp_path / str(digit)).mkdir()
        for path in sorted((digits / str(digit)).iterdir())[:5]:
            (tmp_path / str(digit) / path.name).hardlink_to(path)
    Image.new("RGB", (40, 40)).save(tmp_path / "alone.png")
    (tmp_path / "1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = run(transfer, tmp_path, *TRANSFER, "-o", tmp_path / "t.safetensors", "--epochs", 1)
    assert done.exit_code == 0, done.output
    assert f"left out: 1 alone in their class ({tmp_path.name})" in done.stdout
    assert "left out: 1 unreadable, such as 1/broken.png: " in done.stdout
    assert "8 images to learn from, 2 held out" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["missing"], 2, "missing"),
        (["one"], 2, "5 images in 1 folders, and not two folders with two or more: give"),
        (["broken"], 2, "3 images in 2 folders, and not two"),
        (["empty"], 2, "0 images in 0 folders"),
        (["no-image"], 2, "none of the 4 images can be read, such as 1/"),
        (["two", "--model", "torchvision:alexnet"], 2, "--model torchvision:alexnet: give one of"),
        (["two", "--model", "resnet51"], 2, "unknown model 'resnet51'"),
        (["two", "--weights", "not-there.pth"], 2, "not-there.pth does not exist"),
        (["two", "-o", "tuned.pth"], 2, "-o tuned.pth: give a path that ends in .safetensors"),
        (["two", "-o", "nowhere/t.safetensors"], 1, "its folder is not there"),
    ],
)
def test_transfer_refuses_in_one_line(options, code, told, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, classes in (("one", "1"), ("two", "13"), ("broken", "13"), ("empty", "")):
        (tmp_path / source).mkdir()
        for each in classes:
            (tmp_path / source / each).mkdir()
            for path in sorted((digits / each).iterdir())[:5]:
                (tmp_path / source / each / path.name).hardlink_to(path)
    for each in "1133":
        path = tmp_path / "no-image" / each / f"{len(list(tmp_path.rglob('*.jpg')))}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    for path in sorted((tmp_path / "broken" / "1").iterdir())[1:]:
        path.unlink()
        path.write_bytes(b"no image")
    for path in sorted((tmp_path / "broken" / "3").iterdir())[2:]:
        path.unlink()
    done = run(transfer, *TRANSFER, *options)
    assert done.exit_code == code, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ") and told in line
    assert not list(tmp_path.glob("*.safetensors"))


def test_degradation_trains_each_kind_prints_a_table_and_draws_it(tmp_path, monkeypatch):
    monkeypatch.setattr(degradation, "TESTED", 50)
    picture = tmp_path / "d.png"
    some = ["--depths", 20, "--epochs", 2, "--images", 40, "--picture", picture]
    done = run(degradation, *some, "--highway")
    assert done.exit_code == 0, done.output
    rows = re.findall(ROW, done.stdout, re.MULTILINE)
    assert [(name, int(count.replace(",", ""))) for name, count, *_ in rows] == [
        ("plain-20", 269_072), ("ResNet-20", 269_072), ("highway-20", 368_384),
    ]  # fmt: skip
    assert all(0 <= float(share) <= 100 for row in rows for share in row[2:])
    with Image.open(picture) as image:
        assert image.size == (850, 300)  # three panels
        pixels = np.asarray(image).astype(int)
    for panel in np.split(pixels[:, 40:], 3, axis=1):
        assert (abs(panel - degradation.COLOURS[20]).sum(axis=2) < 30).sum() > 100

    # The same seed gives the same networks.
    again = run(degradation, *some)
    assert re.findall(ROW, again.stdout, re.MULTILINE) == rows[:2]


def test_degradation_reads_the_binary_version_of_cifar_10(tmp_path):
    chance = np.random.default_rng(0)
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    records = chance.integers(0, 256, (len(names), 2, 3073), np.uint8)
    records[:, :, 0] %= 10
    for name, each in zip(names, records, strict=True):
        each.tofile(tmp_path / name)
    train, test = degradation.cifar_10(tmp_path)
    assert train.classes.tolist() == records[:5, :, 0].ravel().tolist()
    assert test.classes.tolist() == records[5, :, 0].tolist()
    red = train.pixels[3, 0]  # normalised, so that only the order is what it was
    expected = records[1, 1, 1:1025].reshape(32, 32)
    assert np.corrcoef(red.numpy().ravel(), expected.ravel())[0, 1] > 0.9999
    assert train.pixels.mean().abs() < 1e-5 and (train.pixels.std() - 1).abs() < 1e-3

    (tmp_path / names[2]).write_bytes(b"cut")
    for folder in (tmp_path, tmp_path / "none"):
        done = run(degradation, "--cifar", folder)
        assert done.exit_code == 1
        (line,) = done.output.splitlines()
        assert f"cannot read CIFAR-10 in {folder}" in line and "data_batch_1.bin" in line


def test_cifar_pictures_are_moved_and_mirrored_and_stay_themselves():
    pixels = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).float() + 1
    moved = degradation.moved(pixels.repeat(40, 1, 1, 1), torch.Generator().manual_seed(0))
    assert moved.shape == (80, 3, 32, 32)
    steps = {int(each[0, 16, 17] - each[0, 16, 16]) for each in moved}
    assert steps == {1, -1}  # to the right, or mirrored
    assert len({float(each[0, 16, 16]) for each in moved}) > 30
    middle = moved[:, :, 4:28, 4:28]
    assert all(torch.isin(each, pixels).all() for each in middle)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--depths", "20,57"], "--depths 57: give some of 20, 32, 44, 56"),
        (["--picture", "nowhere/d.png"], "--picture nowhere/d.png: give a path that ends in .png"),
    ],
)
def test_degradation_refuses_in_one_line(options, told):
    done = run(degradation, *options)
    assert done.exit_code == 1 and done.output.startswith(told)
    assert len(done.output.splitlines()) == 1


def test_without_scikit_learn_both_say_what_to_install(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sklearn.datasets", "resfeat.downstream.learning.probe", "sklearn.linear_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("sklearn.datasets", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    for done in (run(degradation), run(transfer, digits, *TRANSFER)):
        assert done.exit_code > 0
        (line,) = done.output.splitlines()
        assert "not installed: pip install 'resfeat[probe]'" in line


@pytest.mark.slow
def test_56_plain_layers_are_trained_worse_than_20_and_56_residual_ones_are_not(tmp_path):
    done = run(degradation, "--picture", tmp_path / "d.png")
    rows = re.findall(ROW, done.stdout, re.MULTILINE)
    errors = {name: float(error) for name, _, error, _ in rows}
    assert errors["plain-56"] > errors["plain-20"] + 10 and errors["ResNet-56"] < 2
