"""--retry-failed: what failed is done again, and only that; what was embedded is never at risk."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from seams import KILL_AT_STEP, after_import
from tables import planned, rows, vectors

from resfeat import open_dataset
from resfeat.dataset.commit import STEPS
from resfeat.dataset.verify import repair, verify

IMAGES, SHARD, BATCH = 24, 8, 4
# Some in the first shard, none in the second, and all that are in the third.
FAIL_AT_FIRST = {1, 2, 5, *range(16, 24)}
STAY_BROKEN = {5, 18}
MENDED = FAIL_AT_FIRST - STAY_BROKEN
GARBAGE = b"not an image any more"
RETRIED = [0, 2]
IN_BETWEEN = ("noted", "embeddings", "failures")


def name(number):
    return f"some/{number:03}.jpg"


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """Two dozen photographs. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "some").mkdir()
    for number, photo in enumerate(sorted(photos.rglob("*.*"))[::20][:IMAGES]):
        (folder / name(number)).hardlink_to(photo)
    return folder


def put(folder, whole, number):
    """A good photograph at its place, whatever was there."""
    (folder / name(number)).unlink(missing_ok=True)
    (folder / name(number)).hardlink_to(whole / name(number))


def spoil(folder, number):
    """No image at this place: in turns garbage, nothing at all, half a photograph, 0 bytes."""
    place = folder / name(number)
    content = place.read_bytes()
    place.unlink()  # and not written to: it is the same file in other folders
    if number % 4 == 2:
        place.symlink_to("nowhere")
    else:
        place.write_bytes([GARBAGE, content[: len(content) // 2], b"", b""][number % 4])


@pytest.fixture(scope="module")
def options(choices):
    """The options of all runs here, in which 2 of 24 are not too many failures, and 11 are."""
    sizes = ["--shard-size", SHARD, "--batch-size", BATCH]
    return ["--workers", 0, *sizes, "--max-error-rate", 0.1, *choices]


@pytest.fixture(scope="module")
def undisturbed(whole, options, resfeat, tmp_path_factory):
    """The dataset of a run that found the mended images at once. Not to be changed."""
    folder, output = (tmp_path_factory.mktemp(kind) for kind in ("mended", "undisturbed"))
    (folder / "some").mkdir()
    for number in range(IMAGES):
        put(folder, whole, number)
    for number in STAY_BROKEN:
        spoil(folder, number)
    done = resfeat("extract", folder, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def first(whole, options, resfeat, tmp_path_factory):
    """Source and dataset of a run that found many images broken. Not to be changed."""
    folder, output = (tmp_path_factory.mktemp(kind) for kind in ("source", "first"))
    fill(folder, whole)
    done = resfeat("extract", folder, "-o", output, *options)
    assert done.returncode == 3, done.stderr
    return SimpleNamespace(source=folder, output=output)


def fill(folder, whole):
    shutil.rmtree(folder / "some", ignore_errors=True)
    (folder / "some").mkdir()
    for number in range(IMAGES):
        put(folder, whole, number)
    for number in FAIL_AT_FIRST:
        spoil(folder, number)


@pytest.fixture
def case(first, whole, options, tmp_path):
    """A dataset of one's own, with its source as it was; `retry` is what does it again."""
    fill(first.source, whole)
    output = tmp_path / "out"
    shutil.copytree(first.output, output)
    again = ["extract", first.source, "-o", output, *options]
    return SimpleNamespace(
        source=first.source, output=output, again=again, retry=[*again, "--retry-failed"]
    )


def mend(case, whole):
    """Good photographs where some failed. What was embedded is garbage now, or is gone: it would
    fail if it was read once more."""
    for number in range(IMAGES):
        if number in MENDED:
            put(case.source, whole, number)
        elif number not in STAY_BROKEN:
            (case.source / name(number)).unlink()
            if number % 2:
                (case.source / name(number)).write_bytes(GARBAGE)


def content(output):
    """What a dataset holds, and when it was written; less the reports and the lock."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    return {
        path.relative_to(output): (path.stat().st_mtime_ns, path.read_bytes())
        for path in files
        if path.parent.name not in ("runs", "locks")
    }


def failed(output):
    """Id and reason of what failed."""
    table = rows(output, "failures")
    return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def last_report(output):
    newest = max((output / "_resfeat" / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def check_every_image_is_one_row(output):
    dataset = open_dataset(output)
    for shard in dataset.record.plan.shards:
        part = dataset.layout.part_name(shard)
        tables = [pq.read_table(dataset.layout.embeddings / part)]
        if (dataset.layout.failures / part).exists():
            tables.append(pq.read_table(dataset.layout.failures / part))
        embedded, *others = (table["id"].to_pylist() for table in tables)
        ids = [item.id for item in planned(dataset.layout, shard)]
        assert embedded == [each for each in ids if each in set(embedded)]  # in plan order
        assert sorted(sum(others, embedded)) == ids
    assert verify(dataset).problems == []


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.more)])
def test_what_failed_is_done_again_and_nothing_else(workers, case, whole, undisturbed, resfeat):
    assert set(failed(case.output)) == {name(number) for number in FAIL_AT_FIRST}
    assert len(set(failed(case.output).values())) > 2  # more than one kind of failure
    before, reasons = content(case.output), failed(case.output)
    mend(case, whole)

    done = resfeat(*case.retry, "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert rows(case.output).equals(rows(undisturbed))
    assert failed(case.output) == {name(number): reasons[name(number)] for number in STAY_BROKEN}
    check_every_image_is_one_row(case.output)
    assert resfeat("verify", case.output).returncode == 0

    after = content(case.output)
    changed = {path.stem for path in before if before[path] != after.get(path)}
    assert changed == {f"part-{shard:05d}" for shard in RETRIED}
    assert set(after) <= set(before)  # nothing is left of the way there

    report = last_report(case.output)
    assert report["engine"]["engine"] == ("ray" if workers else "inline")
    assert report["images"] == len(FAIL_AT_FIRST)
    assert report["images_failed"] == len(STAY_BROKEN)
    assert report["kept"] == SHARD - len(FAIL_AT_FIRST & set(range(SHARD)))
    assert report["shards"] == len(RETRIED)
    assert report["changed"] == len(MENDED)  # they are not what was listed
    assert (report["embedded"], report["failed"]) == (IMAGES - len(STAY_BROKEN), len(STAY_BROKEN))


def test_where_nothing_was_mended_every_byte_stays(case, resfeat):
    before = content(case.output)
    done = resfeat(*case.retry)
    assert done.returncode == 3, done.stderr
    assert last_report(case.output)["images"] == len(FAIL_AT_FIRST)
    assert content(case.output) == before


def test_where_nothing_failed_there_is_nothing_to_do(case, whole, resfeat):
    for number in FAIL_AT_FIRST:
        put(case.source, whole, number)
    assert resfeat(*case.retry).returncode == 0
    assert not list((case.output / "failures").iterdir())
    before = content(case.output)
    done = resfeat(*case.retry)
    assert done.returncode == 0 and "nothing was left to do" in done.stdout
    assert content(case.output) == before


def test_without_the_option_what_failed_stays_failed(case, whole, resfeat):
    before = content(case.output)
    mend(case, whole)
    done = resfeat(*case.again)
    assert done.returncode == 3 and "nothing was left to do" in done.stdout
    assert content(case.output) == before


# At each, and again at each on the way to mend it, in `test_commit.py`; here by a real kill.
@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=[pytest.mark.more] * (step != "embeddings")) for step in STEPS],
)
def test_killed_at_any_step_it_loses_nothing(
    step, case, whole, undisturbed, command, resfeat, tmp_path
):
    earlier = rows(case.output)
    mend(case, whole)
    env = after_import({"resfeat.dataset.commit": KILL_AT_STEP}, tmp_path / "seam")
    killed = command(*case.retry, env={**env, "KILL_AT": step})
    assert killed.returncode == -signal.SIGKILL

    # Nobody who looks now is told of damage, or led to throw away what is there.
    dataset = open_dataset(case.output)
    found = verify(dataset)
    assert {each.kind for each in found.problems} <= {"unfinished"}
    in_between = step in IN_BETWEEN
    assert found.problems or not in_between  # the other shard may be half way at any step
    assert repair(dataset, found) == []

    resumed = resfeat(*case.again)
    assert resumed.returncode in (0, 3), resumed.stderr
    now = rows(case.output)
    kept = np.isin(now["id"].to_pylist(), earlier["id"].to_pylist())
    assert now.filter(kept).equals(earlier)
    if in_between:  # with the rows that were kept, the shard is done in full
        assert len(now) > len(earlier)
    best = rows(undisturbed)
    assert now.equals(best.filter(np.isin(best["id"].to_pylist(), now["id"].to_pylist())))
    check_every_image_is_one_row(case.output)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


# In the middle of the vectors, where pyarrow reads on without noticing; and where it does notice.
@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_rows_are_not_kept(damage, case, whole, resfeat):
    part = case.output / "embeddings" / "part-00000.parquet"
    damage(part)
    mend(case, whole)
    before = content(case.output)
    done = resfeat(*case.retry)
    assert done.returncode == 1
    complaint = done.stderr.strip().splitlines()[-1]
    assert str(part) in complaint and "resfeat verify --repair" in complaint
    assert "Traceback" not in done.stderr
    after = content(case.output)
    assert all(after[path] == before[path] for path in before if path.stem == "part-00000")


def test_a_mended_image_has_the_vector_of_an_undisturbed_run(first, undisturbed):
    """That the comparisons above are no comparison of nothing with nothing."""
    table = rows(undisturbed)
    assert len(np.unique(vectors(table), axis=0)) == IMAGES - len(STAY_BROKEN)
    assert set(rows(first.output)["id"].to_pylist()) < set(table["id"].to_pylist())
