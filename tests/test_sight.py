"""Whether a worker's machine sees what the driver's does: other files under the same names."""

import json
import os
import shutil

import pytest
from small import embed, write_pictures

from resfeat.dataset import Layout, Record
from resfeat.errors import ResfeatError
from resfeat.plan import addresses
from resfeat.worker.sight import FOLDERS, check_sight, in_sight


def seen(layout):
    """What a run with this dataset asks the workers to see."""
    record = Record.load(layout)
    return in_sight(record.sources, addresses(layout.plan, record.plan))


@pytest.fixture
def dataset(tmp_path):
    """A dataset of a folder and of a table that lists images elsewhere, and what is to be seen."""
    write_pictures(tmp_path / "photos")
    listed = write_pictures(tmp_path / "elsewhere")
    (tmp_path / "images.csv").write_text("\n".join(["uri", *map(str, listed[:1])]))
    layout = Layout(tmp_path / "out")
    embed(layout.root, tmp_path / "photos", tmp_path / "images.csv")
    layout.tmp.mkdir(exist_ok=True, parents=True)
    return layout, Record.load(layout).created, seen(layout)


def told(dataset):
    with pytest.raises(ResfeatError) as raised:
        check_sight(*dataset, "node-7 (10.0.0.7)")
    return str(raised.value)


def test_the_same_files_are_in_sight(dataset, tmp_path):
    check_sight(*dataset, "here")
    assert str(tmp_path / "photos") in dataset[2]


@pytest.mark.parametrize(
    ("name", "is_left"), [("photos", False), ("photos", True), ("elsewhere", True)]
)
def test_a_source_that_is_not_mounted(name, is_left, dataset, tmp_path):
    """An unmounted folder is there, and empty. Of a table also what it lists is looked at."""
    path = tmp_path / name
    (tmp_path / "was").mkdir()
    path.rename(tmp_path / "was" / name)
    if is_left:
        path.mkdir()
        if name == "elsewhere":
            for folder in ("a", "b b"):
                (path / folder).mkdir()
    assert f"the machine node-7 (10.0.0.7) does not see {path}" in told(dataset)


def test_workers_do_without_a_table_that_lists_what_lies_elsewhere(dataset, tmp_path):
    (tmp_path / "images.csv").unlink()
    check_sight(*dataset, "here")


def test_what_the_driver_does_not_see_is_asked_of_nobody(dataset, tmp_path):
    shutil.rmtree(tmp_path / "elsewhere")
    layout, created, _ = dataset
    check_sight(layout, created, seen(layout), "here")


def test_of_many_folders_those_are_looked_at_that_lie_far_apart(tmp_path):
    """Three mounts of a long table, of which the first holds all but two of the folders."""
    uris = []
    for name in [*(f"disk-1/{n:02}" for n in range(3 * FOLDERS)), "disk-2/x", "disk-3/y/z"]:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").touch()
        uris.append((tmp_path / name / "1.jpg").as_uri())
    looked_at = in_sight(["/no/table.csv"], uris)
    found = {os.path.relpath(path, tmp_path).split("/")[0] for path in looked_at}
    assert found == {"disk-1", "disk-2", "disk-3"}
    assert len(looked_at) <= FOLDERS
    assert len(in_sight([], uris[:FOLDERS])) == FOLDERS
    siblings = {int(os.path.basename(path)) for path in in_sight([], uris[: 2 * FOLDERS])}
    assert len(siblings) == FOLDERS and min(siblings) == 0 and max(siblings) == 2 * FOLDERS - 1
    assert in_sight(["relative"], ["s3://bucket/1.jpg"]) == ()


@pytest.mark.parametrize("how", ["gone", "empty", "another"])
def test_an_output_that_is_not_shared(how, dataset):
    layout, *_ = dataset
    if how == "another":  # of the same command, given on this machine alone
        about = json.loads(layout.spec.read_text())
        layout.spec.write_text(json.dumps(about | {"created": "2026-01-01T00:00:00+00:00"}))
    else:
        shutil.rmtree(layout.root)
    if how == "empty":
        layout.root.mkdir()
    assert f"does not see {layout.root}" in told(dataset)


def test_an_output_that_may_not_be_written(dataset, monkeypatch):
    layout, *_ = dataset
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(layout.tmp))
    assert f"may not write to {layout.root}" in told(dataset)
