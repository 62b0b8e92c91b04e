"""The page: what it tells is what is there, in one file, in a real browser, however large."""

import json
import re
import shutil
import subprocess
import sys

import browser
import numpy as np
import pytest
from browser import DESKTOP, PHONE
from command import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import ObjectStore
from photos import write_photos
from pictured import FAILED_EVERY, FEW, MANY, invented
from small import embed
from test_export import dataset, layered  # noqa: F401 (fixtures)

from resfeat import open_dataset
from resfeat.downstream.page import map as layout
from resfeat.downstream.page.map import Sample, alike, draw, lay_out, principal, spread
from resfeat.downstream.page.page import PICTURES, _short, page, render

needs_chromium = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING)

INJECTED = '<script>document.title="owned"<'  # with what follows in the name, a whole script


def told_by(text):
    """The data that a page holds."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


@pytest.fixture(scope="module")
def small(once):
    """About 20 photographs, one of them twice and under a hostile name, and broken ones."""

    def write(folder):
        source = folder / "in"
        write_photos(source, 18, long_side=200)
        (source / INJECTED).mkdir()
        first = sorted((source / "chelsea").iterdir())[0]
        shutil.copy(first, source / INJECTED / "script><b>x.jpg")
        shutil.copy(first, source / "gone.jpg")
        (source / "empty<img src=x onerror=alert(1)>.jpg").write_bytes(b"")
        (source / "bad.jpg").write_bytes(b"bad")
        (source / "bad too.jpg").write_bytes(b"bad")
        embed(folder / "out", source, label_from="parent")
        (source / "gone.jpg").unlink()

    return once("paged", write) / "out"


@pytest.fixture(scope="module")
def told(small):
    return told_by(page(open_dataset(small)))


def test_it_says_what_the_dataset_is(small, told):
    about, record = dict(told["about"]), open_dataset(small).record
    assert about["model"] == "cifar_resnet20" and about["weights"] == "random:0"
    assert about["fingerprint"] == record.identity.fingerprint
    assert about["sources"] == str(small.parent / "in")
    assert "short side to 32, centre 32" in about["pixels"] and "turbo" in about["pixels"]
    counts = open_dataset(small).commits()
    assert told["counts"] == {"images": counts.embedded + 3, "embedded": counts.embedded,
                              "failed": 3, "shards": 1, "shards_left": 0}  # fmt: skip


def test_failures_come_by_reason_with_examples(told):
    found = {each["reason"]: each for each in told["reasons"]}
    assert {reason: each["count"] for reason, each in found.items()} == {
        "unidentified": 2, "empty": 1
    }  # fmt: skip
    assert {name for name, _ in found["unidentified"]["examples"]} == {"bad.jpg", "bad too.jpg"}
    assert found["empty"]["examples"][0][0].startswith("empty<img")


def test_it_tells_of_runs_what_their_reports_say_and_no_more(small, tmp_path):
    shutil.copytree(small, tmp_path / "out")
    (report,) = (tmp_path / "out" / "_resfeat" / "runs").iterdir()
    known = json.loads(report.read_text())
    report.with_name("20200101T030405Z-0000.json").write_text('{"run_id": "20200101T030405Z-0000"}')
    report.with_name("20200102T000000Z-0000.json").write_text("[]")
    report.with_name("20200103T000000Z-0000.json").write_text("{")
    endless = known | {"run_id": "20200104T000000Z-0000", "course": {"1": [1.0, float("nan")]}}
    for n, damaged in enumerate((endless, endless | {"course": {}, "seconds": float("inf")},
                                 endless | {"course": {}, "seconds": "long"})):  # fmt: skip
        report.with_name(f"20200104T000000Z-000{n}.json").write_text(json.dumps(damaged))
    shown = told_by(page(open_dataset(tmp_path / "out")))
    old, new = shown["runs"]
    assert shown["unread"] == 5 and shown["earlier"] == 0 and shown["shown"] == 1
    assert old.pop("when") == "2020-01-01 03:04" and old.pop("updated") is False
    assert old.pop("is_long") is False
    assert set(old.values()) == {None}
    assert new["rate"] == known["images_per_second"] == new["per_worker"]
    assert new["stages"] == known["stages"] and new["verdict"] == known["verdict"]
    assert new["verdict"].startswith("too short to tell")
    (worker, rates), *others = new["course"]["workers"]
    assert worker == "1" and others == [] and rates == known["course"]["1"]
    assert sum(rates) / len(rates) == pytest.approx(known["images_per_second"], rel=0.05)
    assert np.median(rates) > 0  # its one shard took all the time


def test_speed_over_time_is_told_of_the_last_run_and_of_its_slowest_workers(small, tmp_path):
    shutil.copytree(small, tmp_path / "out")
    (report,) = (tmp_path / "out" / "_resfeat" / "runs").iterdir()
    told = json.loads(report.read_text())
    course = {str(n): [float(20 - n), 0.0, 1.0] for n in range(1, 21)}
    for day, more in (2, {"course": course}), (3, {"course": {"1": [1], "2": [1, 2]}}):
        name = f"209901{day:02}T000000Z-0000"
        report.with_name(f"{name}.json").write_text(json.dumps(told | {"run_id": name, **more}))
    shown = told_by(page(open_dataset(tmp_path / "out")))
    assert shown["unread"] == 1  # the last is no course of anything
    first, last = (run["course"] for run in shown["runs"])
    assert first is None and last["count"] == 20
    assert last["all"] == [sum(range(20)), 0, 20]
    assert [name for name, _ in last["workers"]] == [str(n) for n in range(9, 21)]
    assert last["workers"][0][1] == course["9"]


def test_a_run_that_tells_nothing_hides_none_that_does(small, tmp_path):
    shutil.copytree(small, tmp_path / "out")
    (report,) = (tmp_path / "out" / "_resfeat" / "runs").iterdir()
    told = json.loads(report.read_text())
    for day, seconds in (2, 0.9), (3, 1.0), (4, 0.9):
        name = f"209901{day:02}T000000Z-0000"
        more = {"run_id": name, "seconds": seconds}
        report.with_name(f"{name}.json").write_text(json.dumps(told | more))
        shown = told_by(page(open_dataset(tmp_path / "out")))
        assert shown["shown"] == [1, 2, 2][day - 2]
        assert [n for n, run in enumerate(shown["runs"]) if run["course"]] == [shown["shown"]]


def test_neighbours_are_the_exact_ones(small, told):
    ids, vectors = zip(*open_dataset(small).vectors(), strict=True)
    names = [name for some in ids for name in some.to_pylist()]
    units = np.concatenate(vectors)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    assert len(told["neighbours"]) == 6
    for each in told["neighbours"]:
        own = names.index(told["ids"][each["of"]])
        cosines = units @ units[own]
        cosines[own] = -2
        assert len(each["found"]) == 6
        expected = np.sort(cosines)[::-1][:6]
        assert np.allclose([cosine for _, cosine in each["found"]], expected, atol=1e-5)
        assert all(
            abs(cosines[names.index(told["ids"][n])] - cosine) < 1e-5 for n, cosine in each["found"]
        )


def linked(units, near):
    """Groups of rows by a plain search, the largest first."""
    links, left, found = units @ units.T >= near, set(range(len(units))), []
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            group |= edge
            edge = {int(n) for row in edge for n in np.flatnonzero(links[row])} - group
        left -= group
        found += [sorted(group)] if len(group) > 1 else []
    return sorted(found, key=len, reverse=True)


def test_groups_are_told_with_their_size_and_least_cosine(small, told):
    units = draw(open_dataset(small)).units
    groups = linked(units, 0.99)
    assert told["grouped"] == [len(groups), sum(map(len, groups))]
    assert [count for _, count, _ in told["groups"]] == [len(rows) for rows in groups]
    assert sorted(members[0] for members, _, _ in told["groups"]) == sorted(
        rows[0] for rows in groups
    )
    for members, count, least in told["groups"]:
        (rows,) = (each for each in groups if each[0] == members[0])
        assert members == rows[:8] and count == len(rows)
        assert least == pytest.approx((units[rows] @ units[rows].T).min(), abs=1e-5)


def test_an_image_that_is_gone_has_no_picture(told):
    gone = [told["ids"][int(n)] for n, picture in told["pictures"].items() if picture is None]
    assert gone == ["gone.jpg"]
    assert all(each.startswith("data:image/jpeg;base64,")
               for each in told["pictures"].values() if each)  # fmt: skip


def test_labels_are_the_commonest(told):
    assert len(told["map"]["labels"]) == 8 and told["map"]["others"] > 0
    assert {point[2] for point in told["map"]["points"]} == set(range(-1, 8))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), dim=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_the_map_is_that_of_the_whole_covariance(rows, dim, seed):
    chance = np.random.default_rng(seed)
    spreads = np.float32(2.0) ** -np.arange(dim, dtype=np.float32)
    vectors = chance.standard_normal((rows, dim)).astype(np.float32) * spreads
    places, share = principal(vectors)
    centred = vectors - vectors.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)[:2] ** 2
    variances = np.zeros(2)
    variances[: len(values)] = values
    assert places.shape == (rows, 2)
    assert np.allclose((places**2).sum(axis=0), variances, rtol=2e-2, atol=1e-4)
    total = (centred**2).sum()
    assert share == pytest.approx(variances.sum() / total if total > 1e-9 else share, abs=2e-2)
    assert np.array_equal(places, principal(vectors)[0])


def test_two_axes_that_are_there_are_found():
    chance = np.random.default_rng(0)
    axes = np.linalg.qr(chance.standard_normal((50, 2)))[0]
    true = chance.standard_normal((300, 2)) * [10, 4]
    noise = 0.01 * chance.standard_normal((300, 50))
    places, share = principal((true @ axes.T + noise).astype(np.float32))
    for n in (0, 1):
        assert abs(np.corrcoef(places[:, n], true[:, n])[0, 1]) > 0.99
    assert share > 0.99


def test_the_sample_is_spread_over_all_rows_and_all_of_them_if_they_are_few(dataset):  # noqa: F811
    source = open_dataset(dataset)
    names = [name for ids, _ in source.vectors() for name in ids.to_pylist()]
    assert draw(source).ids == names
    few = draw(source, most=3)
    assert few.ids == [names[0], names[4], names[8]] and few.rows == 9
    assert np.allclose(np.linalg.norm(few.units, axis=1), 1)


def test_pictures_are_given_to_thin_regions_too():
    crowd, apart = np.full((1000, 2), 0.1, np.float32), np.float32([[0.9, 0.9], [1, 1], [0.5, 0]])
    chosen = spread(np.concatenate([crowd, apart]), 10)
    assert len(set(chosen)) == 10 and {1000, 1001, 1002} <= {*chosen}
    assert spread(apart, 10) and sorted(spread(apart, 10)) == [0, 1, 2]


def test_groups_are_chains_with_their_least_cosine():
    turns = np.radians([0, 5, 10, 15, 90, 93, 180, 270, 360])
    units = np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)
    sample = Sample([str(n) for n in range(10)], np.concatenate([units, units[:1] * 0]), 10)
    found = alike(sample, near=np.cos(np.radians(5.5)))
    assert [rows for rows, _ in found] == [[0, 1, 2, 3, 8], [4, 5]]
    assert found[0][1] == pytest.approx(np.cos(np.radians(15)), abs=1e-6)
    assert alike(Sample(["a"], units[:1], 1)) == []


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_a_plain_search(seed):
    chance = np.random.default_rng(seed)
    units = chance.standard_normal((700, 3)).astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    expected = linked(units, 0.998)
    found = [rows for rows, _ in alike(Sample([""] * 700, units, 700), near=0.998)]
    assert len(expected) > 5 and sorted(found) == sorted(expected)
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]


def test_one_image_and_equal_images_have_a_map():
    for units in (np.ones((1, 4), np.float32), np.ones((5, 4), np.float32)):
        places, share = lay_out(Sample([""] * len(units), units, len(units)), "pca")
        assert share == 0 and np.isfinite(places).all() and len(places) == len(units)


def test_no_signature_of_an_address_gets_into_a_page():
    assert _short("https://host/a.jpg?X-Amz-Signature=secret") == "https://host/a.jpg"


@pytest.mark.more
def test_umap_is_the_same_each_time_and_says_what_it_needs(monkeypatch):
    pytest.importorskip("umap")
    units = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    sample = Sample([""] * 30, units, 30)
    places, share = lay_out(sample, "umap")
    assert share is None and places.min() == 0 and places.max() == 1
    assert np.array_equal(places, lay_out(sample, "umap")[0])
    with pytest.raises(layout.UsageError, match="at least 5 images: give --map pca"):
        lay_out(Sample([""] * 4, units[:4], 4), "umap")


def test_what_cannot_be_made_is_one_line(small, resfeat, tmp_path, monkeypatch):
    def refused(*arguments, code=2):
        done = resfeat("page", *arguments)
        assert done.returncode == code and done.stdout == ""
        return error_of(done.stderr)

    shutil.copytree(small, tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "embeddings")
    assert "has no embeddings yet" in refused(tmp_path / "begun")
    assert "no resfeat dataset" in refused(tmp_path)
    assert "its folder is not there" in refused(small, "-o", tmp_path / "no" / "x.html", code=1)
    assert "has no layer 'x'" in refused(small, "-o", tmp_path / "x.html", "--layer", "x")
    (tmp_path / "x.html").mkdir()
    assert "is a directory" in resfeat("page", small, "-o", tmp_path / "x.html").stderr
    monkeypatch.setitem(sys.modules, "umap", None)
    told = refused(small, "-o", tmp_path / "y.html", "--map", "umap")
    assert "pip install 'resfeat[umap]'" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "x.html"]


def test_where_it_is_written(layered, resfeat, tmp_path):  # noqa: F811
    shutil.copytree(layered, tmp_path / "out")
    done = resfeat("page", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "out" / "page.html"
    assert done.stdout.startswith(f"Page: {place} (")
    assert "layer2, avgpool (shown: avgpool)" in place.read_text()
    resfeat("page", tmp_path / "out", "-o", tmp_path / "y.html", "--layer", "layer2")
    assert "(shown: layer2)" in (tmp_path / "y.html").read_text()
    assert resfeat("verify", tmp_path / "out").returncode == 0


def test_a_dataset_in_a_store_needs_a_place(small, resfeat, tmp_path):
    with ObjectStore() as store:
        bucket = store.files("bucket")
        for path in small.rglob("*"):
            if path.is_file():
                with bucket.open_output_stream(f"out/{path.relative_to(small)}") as file:
                    file.write(path.read_bytes())
        done = resfeat("page", "s3://bucket/out", env=store.environment)
        assert done.returncode == 2 and "say with -o where" in error_of(done.stderr)
        place = tmp_path / "x.html"
        done = resfeat("page", "s3://bucket/out", "-o", place, env=store.environment)
        assert done.returncode == 0, done.stderr
        assert told_by(place.read_text())["counts"]["failed"] == 3


def test_nothing_of_a_name_is_html(told):
    text = render(**{name: each for name, each in told.items() if name not in ("made", "version")}
                  | {"title": "</title><script>alert(1)</script>@data@"})  # fmt: skip
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<title>&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;@data@ - resfeat" in text
    assert "<img" not in text and "http" not in text.replace("http-equiv", "")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.opened(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


def look(tab, file, size, *, dark):
    """Open a page: nothing is complained of, asked for, or too wide."""
    tab.open(file, size, dark=dark)
    assert tab.complaints() == []
    assert tab.requests() == [file.absolute().as_uri()]
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.run("[...document.images].every((each) => each.naturalWidth === 96)")


def place_of(tab, number):
    """Where a point of the map is on the screen."""
    tab.run("document.getElementById('map').scrollIntoView({block: 'center'})")
    x, y, _ = tab.run(f"told.map.points[{number}]")
    left, top, width, height = tab.run(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.getElementById('map').getBoundingClientRect())"
    )
    return left + 26 + x / 1000 * (width - 52), top + height - 26 - y / 1000 * (height - 52)


@needs_chromium
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(size, dark, small, chromium, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page(open_dataset(small)))
    look(chromium, file, size, dark=dark)
    assert chromium.run("document.title") == "out - resfeat"
    assert chromium.run("document.scripts.length") == 2
    seen = chromium.run("document.body.innerText")
    for text in ("cifar_resnet20", "unidentified", "too short to tell", "cannot be read any more",
                 "Seconds by stage", "worker 1", "linked by cosines of at least 0.99"):  # fmt: skip
        assert text in seen
    assert f"{INJECTED}/script><b>x.jpg"[-31:] in seen
    paper = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(251, 251, 250)")

    names = told_by(file.read_text())["ids"]
    number = next(n for n, name in enumerate(names) if name.startswith("rocket"))
    assert chromium.run("document.getElementById('hint').hidden")
    chromium.run("document.getElementById('pictures').click()")
    (chromium.tap if size == PHONE else chromium.point)(*place_of(chromium, number))
    chromium.run("new Promise((done) => requestAnimationFrame(done))")
    shown = chromium.run("document.getElementById('hint').innerText")
    assert names[number] in shown
    assert chromium.complaints() == []


@needs_chromium
def test_what_a_page_must_not_do_it_cannot(small, chromium, tmp_path):
    """By its policy, even if something of a name came into it."""
    text = page(open_dataset(small))
    file = tmp_path / "page.html"
    wrong = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x.png'>"
    wrong += "<iframe src='http://127.0.0.1:9/'></iframe>"
    wrong += "<b style='color: red' id='styled'>x</b>"
    file.write_text(text.replace("<footer", f"{wrong}<footer"))
    chromium.open(file)
    assert chromium.run("document.title") == "out - resfeat"
    red = chromium.run("getComputedStyle(document.getElementById('styled')).color")
    assert red != "rgb(255, 0, 0)"
    assert len([each for each in chromium.complaints() if "Content Security Policy" in each]) >= 4


@pytest.fixture(scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.more)])
def large_page(request, once, tmp_path_factory):
    """How many rows; their page; and the MiB that it took in all, and to read the rows."""
    folder = tmp_path_factory.mktemp("large")
    measure = """
import resource, sys, tracemalloc
from pathlib import Path
import torch
from resfeat import open_dataset
from resfeat.downstream.page import page
def on_step(step):
    if step == "reading the rows":
        tracemalloc.start()
    elif tracemalloc.is_tracing():
        print(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Path(sys.argv[2]).write_text(page(open_dataset(sys.argv[1]), step=on_step))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    words = [str(invented(once, request.param)), str(folder / "page.html")]
    done = subprocess.run([sys.executable, "-c", measure, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reading, more = map(float, done.stdout.split())
    return request.param, folder / "page.html", more, reading


def test_the_page_of_many_rows_is_small(large_page):
    count, file, more, reading = large_page
    assert file.stat().st_size < 4e6
    assert more < 400
    assert reading < count * 64 * 4 / 2**20  # what all vectors would take
    told = told_by(file.read_text())
    failed = count // FAILED_EVERY
    assert told["counts"]["embedded"] == count - failed == told["map"]["rows"]
    assert [(each["reason"], each["count"], len(each["examples"])) for each in told["reasons"]] == [
        ("truncated", failed, 3)
    ]
    assert len(told["map"]["points"]) == layout.SAMPLE
    assert PICTURES <= len(told["pictures"]) < 600
    assert len(told["runs"]) == 30


@needs_chromium
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_many_rows_in_a_browser(size, large_page, chromium):
    count, file, *_ = large_page
    look(chromium, file, size, dark=False)
    seen = chromium.run("document.body.innerText")
    assert "limited by:" in seen and "worker 2" in seen and "worker 3" not in seen
    assert (
        f"4,096 of {count - count // FAILED_EVERY:,} images" in seen and "23 earlier runs" in seen
    )
    assert chromium.run("document.querySelectorAll('.columns:not(.thin) div').length") == 30
    assert chromium.run("document.querySelectorAll('.columns.thin div').length") == 3 * 40


def test_the_template_is_in_the_wheel(tmp_path):
    """What is installed has it, not only a clone."""
    from zipfile import ZipFile

    root = browser.Path(__file__).parents[1]
    words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    copied = tmp_path / "copied"
    shutil.copytree(root / "resfeat", copied / "resfeat", ignore=shutil.ignore_patterns("__py*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copied)
    done = subprocess.run([sys.executable, *words, str(copied)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "resfeat/downstream/page/page.html" in ZipFile(wheel).namelist()
