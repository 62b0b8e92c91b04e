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
def runs(hostile, choices, resfeat, tmp_path_factory):
    """Two runs: on Ray, and in one process."""
    outputs = []
    for workers in (1, 0):
        output = tmp_path_factory.mktemp("hostile-out") / "out"
        done = resfeat("extract", hostile[0], "-o", output, "--workers", workers, *choices,
                       "--shard-size", 64, "--max-error-rate", 1, "--log-json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append((output, done))
    return outputs


def outcomes(output):
    embedded, failed = rows(output), rows(output, "failures")
    reasons = dict(zip(failed["id"].to_pylist(), failed["reason"].to_pylist(), strict=True))
    both = [*embedded["id"].to_pylist(), *reasons]
    assert len(both) == len(set(both))
    return reasons | dict.fromkeys(embedded["id"].to_pylist())


def test_every_file_is_one_row_with_the_outcome_that_it_must_have(hostile, runs):
    _, expected = hostile
    given = outcomes(runs[0][0])
    assert given.keys() == expected.keys()
    assert {name: reason for name, reason in given.items() if reason not in expected[name]} == {}
    assert {reason for reason in given.values() if reason} <= set(REASONS)


def test_no_worker_is_lost(runs):
    report = json.loads(runs[0][1].stdout.splitlines()[-1])
    assert report["engine"]["worker_deaths"] == 0


def test_two_runs_agree(runs):
    (first, _), (second, _) = runs
    assert rows(first).equals(rows(second))
    assert rows(first, "failures").equals(rows(second, "failures"))


def test_what_is_printed_cannot_control_a_terminal(runs):
    for _, done in runs:
        told = done.stdout + done.stderr
        assert not [c for c in told if ord(c) < 32 and c not in "\n\r\t"]


def test_a_neighbour_of_hostile_images_has_the_embedding_that_it_has_alone(
    hostile, runs, choices, resfeat, tmp_path
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
    among = rows(runs[0][0]).select(["id", "embedding"])
    assert among.filter(pc.is_in(among["id"], alone["id"])).equals(alone)


def test_ids_lead_back_to_the_files(hostile, runs):
    folder, _ = hostile
    plan = ds.dataset(runs[0][0] / "_resfeat" / "plan").to_table()
    from resfeat.sources.directory import path_of

    for uri in plan["uri"].to_pylist():
        path = Path(path_of(uri))
        assert path.is_relative_to(folder) and (path.exists() or path.is_symlink())
