"""A folder of hostile files, by the command: a row each, twice the same, and no harm to others."""

import json
import shutil
import subprocess
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from tables import rows

from resfeat.errors import REASONS

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def hostile(hostile_files, photos, tmp_path_factory):
    """Hostile files, and good photographs right among them in the order of the plan."""
    there, expected = hostile_files
    folder = tmp_path_factory.mktemp("hostile") / "files"
    subprocess.run(["cp", "-al", there, folder], check=True)  # links, a pipe among them
    expected = dict(expected)
    before = sorted(expected, key=lambda name: name.encode())
    for number, photo in enumerate(sorted((photos / "coffee").glob("*.jpg"))[:12]):
        # A name that sorts right behind that of a hostile one.
        stem = before[number * len(before) // 12].encode()[:200].decode(errors="ignore")
        name = stem.replace("/", "_") + "~neighbour.jpg"
        shutil.copy(photo, folder / name)
        expected[name] = frozenset([None])
    return folder, expected


@pytest.fixture(scope="module")
def run(hostile, choices, resfeat, tmp_path_factory):
    """The dataset by so many workers, and what the command told."""

    def extract(workers):
        output = tmp_path_factory.mktemp("hostile-out") / "out"
        done = resfeat("extract", hostile[0], "-o", output, "--workers", workers, *choices,
                       "--shard-size", 64, "--max-error-rate", 1, "--log-json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        return output, done

    return extract


@pytest.fixture(scope="module")
def by_ray(run):
    return run(1)


def outcomes(output):
    embedded, failed = rows(output), rows(output, "failures")
    reasons = dict(zip(failed["id"].to_pylist(), failed["reason"].to_pylist(), strict=True))
    both = [*embedded["id"].to_pylist(), *reasons]
    assert len(both) == len(set(both))
    return reasons | dict.fromkeys(embedded["id"].to_pylist())


def test_every_file_is_one_row_with_the_outcome_that_it_must_have(hostile, by_ray):
    _, expected = hostile
    given = outcomes(by_ray[0])
    assert given.keys() == expected.keys()
    assert {name: reason for name, reason in given.items() if reason not in expected[name]} == {}
    assert {reason for reason in given.values() if reason} <= set(REASONS)


def test_no_worker_is_lost(by_ray):
    report = json.loads(by_ray[1].stdout.splitlines()[-1])
    assert report["engine"]["worker_deaths"] == 0


@pytest.mark.more  # test_hostile.py has each file decoded twice and compares the bits
def test_two_runs_agree(by_ray, run):
    (first, _), (second, done) = by_ray, run(0)
    assert rows(first).equals(rows(second))
    assert rows(first, "failures").equals(rows(second, "failures"))
    assert_harmless(done)


def test_what_is_printed_cannot_control_a_terminal(by_ray):
    assert_harmless(by_ray[1])


def assert_harmless(done):
    told = done.stdout + done.stderr
    assert not [c for c in told if ord(c) < 32 and c not in "\n\r\t"]


def test_a_neighbour_of_hostile_images_has_the_embedding_that_it_has_alone(
    hostile, by_ray, choices, resfeat, tmp_path
):
    folder = tmp_path / "alone"
    folder.mkdir()
    names = [path.name for path in hostile[0].glob("*~neighbour.jpg")]
    assert len(names) == 12
    for name in names:
        shutil.copy(hostile[0] / name, folder)
    done = resfeat("extract", folder, "-o", tmp_path / "out", "--workers", 0, *choices)
    assert done.returncode == 0, done.stderr
    alone = rows(tmp_path / "out").select(["id", "embedding"])
    among = rows(by_ray[0]).select(["id", "embedding"])
    assert among.filter(pc.is_in(among["id"], alone["id"])).equals(alone)


def test_ids_lead_back_to_the_files(hostile, by_ray):
    folder, _ = hostile
    plan = ds.dataset(by_ray[0] / "_resfeat" / "plan").to_table()
    from resfeat.sources.directory import path_of

    for uri in plan["uri"].to_pylist():
        path = Path(path_of(uri))
        assert path.is_relative_to(folder) and (path.exists() or path.is_symlink())
