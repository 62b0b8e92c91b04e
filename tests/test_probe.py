"""Probing: what is measured is what scikit-learn measures, on images that were not learned from."""

import json
import os
import shutil
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from command import error_of
from labelled import invent
from later import Later
from PIL import Image
from small import embed, write_pictures

from resfeat.downstream.learning import Classifier, gather, in_order, labels_of, open_views
from resfeat.downstream.learning.confusion import FULL, PAPER, confusion_picture

probe = Later("resfeat.downstream.learning.probe")

DIGITS = 300


def regression(*before):
    """scikit-learn's, of dimensions divided by their spread and half of that of all."""

    from sklearn import base, linear_model, pipeline

    class Damped(base.TransformerMixin, base.BaseEstimator):
        def fit(self, vectors, which):
            self.mean_, spread = vectors.mean(axis=0), vectors.std(axis=0)
            self.scale_ = spread + 0.5 * np.linalg.norm(spread) / len(spread) ** 0.5
            return self

        def transform(self, vectors):
            return (vectors - self.mean_) / self.scale_

    return pipeline.make_pipeline(*before, Damped(), linear_model.LogisticRegression(max_iter=1000))


def ids(count):
    return [f"{n:03}.png" for n in range(count)]


def clusters(classes, each, dims, seed=0, spread=0.1):
    """Classes as text, in turn, and vectors [classes * each, dims] around a centre for each."""
    chance = np.random.default_rng(seed)
    which = np.arange(classes * each) % classes
    centres = chance.standard_normal((classes, dims))
    vectors = centres[which] + spread * chance.standard_normal((len(which), dims))
    return [f"c{n}" for n in which], vectors.astype(np.float32)


def data_of(*paths, label="label"):
    datasets, views = open_views([str(path) for path in paths])
    return gather(datasets, views, labels_of(datasets, label))


def measured(data, **method):
    return probe.measure(data, probe.Method(**method), lambda step: None)


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory):
    """7 classes of 20 that are near each other: no guess is always right. Not to be changed."""
    labels, vectors = clusters(7, 20, 12, spread=1.5)
    output = tmp_path_factory.mktemp("probe") / "out"
    return invent(output, ids(len(labels)), vectors, label=labels)


def test_the_scores_are_those_of_scikit_learn(overlapping):
    from sklearn import model_selection, neighbors, preprocessing

    data = data_of(overlapping)
    raw = np.concatenate([vectors for _, vectors in open_views([str(overlapping)])[0][0].vectors()])
    folds = model_selection.StratifiedKFold(5, shuffle=True, random_state=3)
    linear = regression(preprocessing.Normalizer())
    nearest = neighbors.KNeighborsClassifier(4, metric="cosine", weights="distance")
    found = measured(data, folds=5, k=4, seed=3)
    assert [score.classifier for score in found.scores] == ["k-NN (4)", "logistic regression"]
    for model, score in zip((nearest, linear), found.scores, strict=True):
        guessed = model_selection.cross_val_predict(model, raw, data.which, cv=folds)
        assert score.top1 == pytest.approx((guessed == data.which).mean())
        assert 0.4 < score.top1 < score.top5 < 1
    expected = np.zeros((7, 7), int)
    np.add.at(expected, (data.which, guessed), 1)
    assert np.array_equal(found.confusion, expected)
    assert found.tested == len(data.which)
    (true, taken, count), *_ = found.most_confused(3)
    assert true != taken and count == (expected - np.diag(np.diag(expected))).max()


def test_nothing_is_learned_from_what_is_tested(tmp_path):
    """Labels by chance are guessed by chance; a classifier that had seen them would know them."""
    chance = np.random.default_rng(5)
    labels = [str(n) for n in chance.permutation(np.arange(120) % 2)]
    vectors = chance.standard_normal((120, 200))
    data = data_of(invent(tmp_path / "out", ids(120), vectors, label=labels))
    for method in ({"folds": 5}, {"test": 0.5}):
        for score in measured(data, **method).scores:
            assert 0.25 < score.top1 < 0.75
    sees_all = probe.learn(data)
    guess, _ = sees_all.decide([sees_all.share(0, data.vectors)])
    assert (guess == data.which).mean() > 0.95


def test_splits_keep_the_shares_of_classes_and_the_seed_chooses_them():
    which = np.array([0] * 40 + [1] * 20 + [2] * 10)
    data = type("", (), {"which": which, "classes": ("a", "b", "c")})
    ((train, test),) = probe._splits(data, probe.Method(test=0.3))
    assert Counter(which[test]) == {0: 12, 1: 6, 2: 3}
    assert sorted([*train, *test]) == list(range(70))
    ((_, again),) = probe._splits(data, probe.Method(test=0.3))
    ((_, other),) = probe._splits(data, probe.Method(test=0.3, seed=1))
    assert np.array_equal(again, test) and not np.array_equal(other, test)
    tested = [test for _, test in probe._splits(data, probe.Method(folds=5))]
    assert sorted(np.concatenate(tested)) == list(range(70))


def test_few_of_each_class_are_drawn_from_what_may_be_learned():
    which = np.array([0] * 30 + [1] * 30 + [2] * 3)
    splits = [
        (np.arange(0, 63, 2), np.arange(1, 63, 2)),
        (np.arange(1, 63, 2), np.arange(0, 63, 2)),
    ]
    drawn = list(probe._few(which, splits, 5, seed=0))
    assert len(drawn) == len(splits) * probe.DRAWS
    assert len({tuple(sorted(train)) for train, _ in drawn}) == len(drawn)
    for number, (train, test) in enumerate(drawn):
        full, same = splits[number // probe.DRAWS]
        assert set(train) <= set(full) and np.array_equal(test, same)
        assert Counter(which[train]) == {0: 5, 1: 5, 2: (full >= 60).sum()}


def test_a_few_images_teach_less_than_all(overlapping):
    for score in measured(data_of(overlapping), folds=4).scores:
        one, five, ten = (score.few_shot[n] for n in (1, 5, 10))
        assert 1 / 7 < one < five < ten < score.top1 + 0.05


def test_a_class_without_a_vote_is_not_among_the_first_five():
    votes = np.float32([[0.6, 0.4, 0, 0, 0, 0, 0], [0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0]])
    assert probe._top(np.array([2, 6]), votes, 5) == 0
    assert probe._top(np.array([1, 0]), votes, 5) == 1


def test_two_classes_are_decided_as_by_scikit_learn(tmp_path):
    labels, vectors = clusters(2, 40, 6, spread=1.2)
    data = data_of(invent(tmp_path / "out", ids(80), vectors, label=labels))
    expected = regression().fit(data.vectors, data.which).predict_proba(data.vectors)
    made = probe.learn(data)
    best, probability = made.decide([made.share(0, vectors)])
    assert np.array_equal(best, expected.argmax(axis=1))
    assert np.allclose(probability, expected.max(axis=1), atol=1e-3)
    assert measured(data).scores[0].top5 is None


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two datasets of the same 160 images in four classes. One tells a and b from c and d, and the
    other a and c from b and d. They list them in other orders, and each lacks some."""
    folder = tmp_path_factory.mktemp("halves")
    chance, names, which = np.random.default_rng(0), ids(160), np.arange(160) % 4
    labels = np.array(list("abcd"))[which]
    for name, weights, tells, rows in (
        ("one", "random:0", which // 2, np.arange(0, 155)),
        ("two", "random:1", which % 2, chance.permutation(np.arange(3, 160))),
    ):
        vectors = np.eye(2)[tells] + 0.2 * chance.standard_normal((160, 2))
        invent(folder / name, [names[n] for n in rows], vectors[rows], weights=weights,
               label=labels[rows].tolist())  # fmt: skip
    return folder / "one", folder / "two"


def test_backbones_together_tell_what_each_alone_does_not(halves, resfeat, tmp_path):
    done = resfeat("probe", *halves, "--folds", 4, "--json", "--save", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["images"] == 152 and told["classes"] == ["a", "b", "c", "d"]
    assert told["left_out"] == {"not_in_all": 8, "unlabelled": 0, "alone": []}
    by_name = {(score["embeddings"], score["classifier"]): score for score in told["scores"]}
    for path in halves:
        for classifier in ("k-NN (5)", "logistic regression"):
            assert 0.35 < by_name[str(path), classifier]["top1"] < 0.65
    for classifier in ("k-NN (5)", "logistic regression"):
        assert by_name["together", classifier]["top1"] > 0.97
        assert by_name["together", classifier]["dims"] == 4

    # In any order of the datasets, and in whatever order they list the images.
    for given in (halves, halves[::-1]):
        done = resfeat("predict", tmp_path / "both", *given, "--json")
        assert done.returncode == 0, done.stderr
        assert "left out: 8 images" in done.stderr
        guessed = {row["id"]: row["label"] for row in json.loads(done.stdout)}
        assert set(guessed) == set(ids(160)[3:155])
        right = [label == "abcd"[int(name[:3]) % 4] for name, label in guessed.items()]
        assert np.mean(right) > 0.97


def test_what_is_saved_and_loaded_decides_as_before(overlapping, resfeat, tmp_path):
    from resfeat.downstream.learning import Predictions

    data = data_of(overlapping)
    made = probe.learn(data)
    made.save(str(tmp_path / "saved"), {})
    loaded = Classifier.load(str(tmp_path / "saved"))
    (dataset,), _ = open_views([str(overlapping)])
    before, after = (
        pa.Table.from_batches(Predictions.of_datasets(each, [dataset])) for each in (made, loaded)
    )
    assert before.equals(after) and before["id"].to_pylist() == ids(140)
    expected = regression().fit(data.vectors, data.which).predict(data.vectors)
    assert before["label"].to_pylist() == [f"c{n}" for n in expected]

    done = resfeat("predict", tmp_path / "saved", overlapping, "-o", tmp_path / "new.parquet")
    assert done.stdout == f"Predictions: 140 in {tmp_path}/new.parquet\n"
    assert pa.parquet.read_table(tmp_path / "new.parquet").equals(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.parquet", "saved"]
    told = json.loads(resfeat("predict", tmp_path / "saved", overlapping, "--json").stdout)
    assert [row["label"] for row in told] == before["label"].to_pylist()
    lines = resfeat("predict", tmp_path / "saved", overlapping).stdout.splitlines()
    assert lines[0].split() == ["probability", "label", "id"] and len(lines) == 141
    assert lines[1].split()[1:] == [before["label"][0].as_py(), "000.png"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Handwritten digits, embedded by two small networks, and their raw pixels as a dataset."""
    from sklearn.datasets import load_digits

    folder, there = tmp_path_factory.mktemp("digits"), load_digits()
    names = []
    for number, (pixels, digit) in enumerate(zip(there.images, there.target, strict=True)):
        if number == DIGITS:
            break
        names.append(f"{digit}/{number:04}.png")
        (folder / "in" / str(digit)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / "in" / names[-1])
    embed(folder / "avg", folder / "in", label_from="parent")
    embed(folder / "max", folder / "in", label_from="parent", pool="max")
    labels = [name[0] for name in names]
    invent(folder / "raw", names, there.data[:DIGITS], weights="random:7", label=labels)
    return folder


def test_digits_by_networks_of_chance_together_and_beside_their_pixels(
    digits, resfeat, tmp_path, monkeypatch
):
    monkeypatch.chdir(digits)
    monkeypatch.setattr("resfeat.downstream.learning.probe.DRAWS", 1)
    done = resfeat("probe", "avg", "max", "--folds", 5, "--save", tmp_path / "p",
                   "--picture", tmp_path / "c.png", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    votes, best = (
        {score["embeddings"]: score["top1"] for score in told["scores"][kind::2]} for kind in (0, 1)
    )
    for alone in ("avg", "max"):
        assert 0.7 < votes[alone] < votes["together"]
        assert votes[alone] + 0.05 < best[alone] < best["together"] + 0.01
    assert told["images"] == np.sum(told["confusion"]) == DIGITS
    assert told["classes"] == list("0123456789")
    raw = json.loads(resfeat("probe", "raw", "--folds", 5, "--json").stdout)["scores"][1]
    assert raw["embeddings"] == "raw" and raw["top1"] > 0.9
    assert Image.open(tmp_path / "c.png").size[0] > 400

    # Image files get what the rows of the dataset get, through both networks.
    done = resfeat("predict", tmp_path / "p", "max", "avg", "--json")
    rows = {row["id"]: row for row in json.loads(done.stdout)}
    some = sorted(rows)[::60]
    images = [f"in/{name}" for name in some]
    done = resfeat("predict", tmp_path / "p", *images, "--json")
    for name, row in zip(some, json.loads(done.stdout), strict=True):
        assert row["id"] == f"in/{name}" and row["label"] == rows[name]["label"] == name[0]
        assert row["probability"] == pytest.approx(rows[name]["probability"], abs=1e-3)


def test_the_table(halves, overlapping, resfeat, tmp_path):
    lines = resfeat("probe", overlapping, "--test", 0.25).stdout.splitlines()
    assert lines[0] == "140 images in 7 classes, 35 of them to test with"
    heads = ["embeddings", "dims", "classifier", "top-1", "spread", "top-5", "1", "a", "class"]
    assert lines[2].split()[:9] == heads
    assert lines[3].split()[:4] == [str(overlapping), "12", "k-NN", "(5)"]
    assert "Most often wrong, by the last: c" in lines[-1]
    lines = resfeat("probe", *halves, "--folds", 3, "-k", 7).stdout.splitlines()
    assert lines[:2] == ["152 images in 4 classes, 3 folds", "Left out: 8 not in every dataset"]
    assert [line.split()[0] for line in lines[4:10]] == [
        *(str(path) for path in halves for _ in range(2)), "together", "together"
    ]  # fmt: skip


def test_labels_come_from_what_was_kept_or_from_a_file(tmp_path, resfeat):
    labels, vectors = clusters(3, 12, 5)
    kind, name = pa.array([int(each[1]) * 10 for each in labels]), [f"n{n}" for n in range(36)]
    out = invent(tmp_path / "out", ids(36), vectors, kind=kind, name=name)
    told = json.loads(resfeat("probe", out, "--label", "kind", "--json").stdout)
    assert told["classes"] == ["0", "10", "20"] and told["scores"][1]["top1"] == 1
    rows = [f"{key},{label}" for key, label in zip(ids(36), labels, strict=True)]
    rows[0], rows[1] = "000.png,", "001.png,alone"
    (tmp_path / "l.csv").write_text("\n".join(["id,label", *rows, "other.png,c1"]))
    told = json.loads(resfeat("probe", out, "--labels", tmp_path / "l.csv", "--json").stdout)
    assert told["classes"] == ["c0", "c1", "c2"] and told["images"] == 34
    assert told["left_out"] == {"not_in_all": 0, "unlabelled": 1, "alone": ["alone"]}
    plain = resfeat("probe", out, "--labels", tmp_path / "l.csv").stdout
    assert "Left out: 1 without a label; 1 alone in their class (alone)" in plain


def test_numbers_are_in_the_order_of_numbers():
    assert in_order(["10", "9", "2"]) == ("2", "9", "10")
    assert in_order(["10", "9", "b"]) == ("10", "9", "b")


def test_a_layer_of_several_and_two_of_them_side_by_side(tmp_path, resfeat):
    labels, vectors = clusters(3, 12, 5)
    noise = np.random.default_rng(1).standard_normal((36, 4))
    layers = {"layer2": 4, "avgpool": 5}
    out = invent(
        tmp_path / "out", ids(36), np.hstack([noise, vectors]), layers=layers, label=labels
    )
    good, bad = (
        json.loads(resfeat("probe", out, *more, "--json").stdout)["scores"][1]
        for more in ((), ("--layer", "layer2"))
    )
    assert good["top1"] == 1 and good["embeddings"] == f"{out}:avgpool"
    assert bad["top1"] < 0.9 and bad["dims"] == 4
    both = ("probe", out, out, "--layer", "layer2,avgpool", "--save", tmp_path / "p", "--json")
    assert json.loads(resfeat(*both).stdout)["scores"][-1]["dims"] == 9
    guessed = json.loads(resfeat("predict", tmp_path / "p", out, "--json").stdout)
    assert [row["label"] for row in guessed] == labels


def refused(done, code=2):
    assert done.returncode == code and done.stdout == "", done.stderr
    return error_of(done.stderr)


def test_what_cannot_be_probed_is_one_line(overlapping, halves, resfeat, tmp_path):
    def probing(*arguments, code=2):
        return refused(resfeat("probe", *arguments), code)

    _, vectors = clusters(2, 10, 3)
    columns = {"one": ["x"] * 20, "name": ids(20), "few": ["x"] * 19 + ["y"],
               "none": pa.array([None] * 20, pa.string()), "list": [[1]] * 20,
               "rare": ["x", "x", "y", "y"] + [None] * 16}  # fmt: skip
    odd = invent(tmp_path / "odd", ids(20), vectors, **columns)
    plain = invent(tmp_path / "plain", [f"x{n}" for n in range(4)], vectors[:4], weights="random:3")
    assert "no resfeat dataset" in probing(tmp_path)
    assert "give one of one, name, few, none, list, rare" in probing(odd)
    assert "it has none: give --labels" in probing(plain)
    assert "all 20 labelled images" in probing(odd, "--label", "one")
    assert "no two images" in probing(odd, "--label", "name")
    assert "'x' is the only class" in probing(odd, "--label", "few")
    assert "none of the 20 images has a label" in probing(odd, "--label", "none")
    assert "has the type list" in probing(odd, "--label", "list")
    assert "give at most 2" in probing(odd, "--label", "rare", "--folds", 3)
    assert "give --folds 2" in probing(odd, "--label", "rare")
    assert "no image in common" in probing(overlapping, plain)
    assert "the same kind of embeddings" in probing(overlapping, overlapping)
    assert "3 layers for 2 datasets" in probing(*halves, "--layer", "a,b,c")
    assert "has no layer 'no'" in probing(overlapping, "--layer", "no")
    assert "give one of them" in probing(overlapping, "--folds", 5, "--test", 0.1)
    labels = tmp_path / "l.csv"
    for content, told in (
        ("id,kind\n1,2\n", "no column 'label'"), ("", "names nothing"),
        ("id,label\nx,1\nx,2\n", "gives 'x' two labels"), ("id,label\nx,1\n", "ids like 'x'"),
    ):  # fmt: skip
        labels.write_text(content)
        assert told in probing(overlapping, "--labels", labels)
    assert "cannot read the labels" in probing(overlapping, "--labels", tmp_path / "no.csv")
    assert "something else is there" in probing(overlapping, "--save", overlapping)
    assert "give a folder on a disk" in probing(overlapping, "--save", "s3://bucket/p")
    assert "cannot write" in probing(overlapping, "--picture", tmp_path / "no" / "c.png", code=1)


def test_broken_files_are_passed_over_and_told(resfeat, tmp_path):
    """By a probe of two datasets, too. One alone is an error, as are all."""
    good = write_pictures(tmp_path / "in", 19)
    for pool in ("avg", "max"):
        embed(tmp_path / pool, tmp_path / "in", label_from="parent", pool=pool)
    probe.learn(data_of(tmp_path / "avg", tmp_path / "max")).save(str(tmp_path / "both"), {})
    bad = [tmp_path / "bad.png", tmp_path / "empty.png"]
    bad[0].write_bytes(b"bad")
    bad[1].write_bytes(b"")
    predicted = resfeat("predict", tmp_path / "both", *good, "--json")
    assert predicted.returncode == 0 and predicted.stderr == ""
    done = resfeat("predict", tmp_path / "both", bad[0], *good, "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(predicted.stdout)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Skipped, 1 so far: {bad[0]}: unidentified, ")
    done = resfeat("predict", tmp_path / "both", bad[0], *good, bad[1], "--json")
    assert done.returncode == 3 and json.loads(done.stdout) == json.loads(predicted.stdout)
    _, second, error = done.stderr.splitlines()
    assert second.startswith(f"Skipped, 2 so far: {bad[1]}: empty, ")
    assert error == "Error: 2 of 21 images gave no embedding, more than 5%: see above"
    none = refused(resfeat("predict", tmp_path / "both", *bad), 2)
    assert f"none of the 2 images gives an embedding, the first is {bad[0]}: unidentified" in none
    assert "; give others, or" in none
    assert f"cannot embed {bad[1]}: empty" in refused(
        resfeat("predict", tmp_path / "both", bad[1]), 2
    )
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(good[0], odd)
    done = resfeat("predict", tmp_path / "both", odd, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert [row["id"] for row in json.loads(done.stdout)] == [str(tmp_path / r"caf\xe9.png")]


def test_a_probe_that_does_not_fit_or_is_damaged_is_one_line(
    overlapping, halves, resfeat, tmp_path, monkeypatch
):
    def predicting(*arguments, code=2):
        return refused(resfeat("predict", *arguments), code)

    one, two = halves
    saved, both = tmp_path / "saved", tmp_path / "both"
    for folder, given in ((saved, [one]), (both, halves)):
        data = data_of(*given)
        probe.learn(data).save(str(folder), {})
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    (tmp_path / "bad.png").write_bytes(b"bad")
    assert "no probe in" in predicting(tmp_path / "no", one)
    assert "other embeddings than the probe" in predicting(saved, two)
    assert "is missing: give one of each" in predicting(both, one)
    assert "have the same fingerprint" in predicting(saved, one, one)
    assert "either of them" in predicting(saved, one, picture)
    assert "no resfeat dataset" in predicting(saved, tmp_path)
    assert "unidentified" in predicting(saved, tmp_path / "bad.png")
    assert "give one of them" in predicting(saved, one, "--json", "-o", tmp_path / "x.parquet")
    assert "cannot write" in predicting(saved, one, "-o", tmp_path / "no" / "x.parquet", code=1)

    about, tensors = saved / "probe.json", saved / "probe.safetensors"
    good = {path: path.read_bytes() for path in (about, tensors)}
    told = json.loads(good[about])
    for path, content, reason in (
        (tensors, good[tensors][:-1] + b"x", "is not what probe.json was saved with"),
        (tensors, None, "No such file"),
        (about, b"{", "is damaged"),
        (about, b"[]", "is damaged"),
        (about, json.dumps({**told, "classes": ["a"]}).encode(), "lacks datasets or classes"),
        (about, json.dumps({**told, "classes": list("abcde")}).encode(), "should be of (5, 2)"),
        (about, json.dumps({k: v for k, v in told.items() if k != "sha256"}).encode(), "'sha256'"),
        (about, json.dumps({**told, "format": 9, "resfeat": "7.0"}).encode(), "of resfeat 7.0"),
    ):  # fmt: skip
        path.unlink() if content is None else path.write_bytes(content)
        assert reason in predicting(saved, one, code=1)
        path.write_bytes(good[path])
    moved = {**told, "datasets": [{**told["datasets"][0], "path": "/nowhere"}]}
    about.write_bytes(json.dumps(moved).encode())
    assert "is not at /nowhere any more" in predicting(saved, picture)
    assert resfeat("predict", saved, one, "--json").returncode == 0


def test_without_scikit_learn_a_probe_is_one_line_and_a_saved_one_is_applied(
    halves, resfeat, tmp_path, monkeypatch
):
    made = probe.learn(data_of(halves[0]))
    made.save(str(tmp_path / "p"), {})
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "resfeat.downstream.learning.probe")
    monkeypatch.delattr("resfeat.downstream.learning.probe")
    assert "pip install 'resfeat[probe]'" in refused(resfeat("probe", halves[0]))
    assert resfeat("predict", tmp_path / "p", halves[0]).returncode == 0


@pytest.mark.parametrize("classes", [2, 10, 70, 1200])
def test_the_picture_is_dark_where_many_are(classes):
    confusion = np.eye(classes, dtype=np.int64) * 9
    confusion[0] = 0
    confusion[0, -1] = 9
    picture = confusion_picture(confusion, [f"a\nlong name \x1b {n} " * 3 for n in range(classes)])
    pixels = np.asarray(picture).reshape(-1, 3)
    assert max(picture.size) < 1400
    cell = max(1, min(48, 900 // classes))
    dark = (pixels == FULL).all(axis=1).sum()
    assert 0.6 * classes * cell**2 < dark <= classes * cell**2
    left, top = picture.width, picture.height
    assert picture.getpixel((left - 1, top - 1)) == PAPER
    corner = np.argwhere((np.asarray(picture) == FULL).all(axis=2))
    assert corner[0][1] > corner[-1][1] - cell  # the first class was taken for the last
