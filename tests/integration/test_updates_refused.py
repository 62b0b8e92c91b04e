"""What an update must not do is refused in one line, and --dry-run only says what one would do:
after both every file is as it was."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from changing import FEATURES, SMALL, Collection, every_row, last_report
from command import error_of

COUNT = 24


@pytest.fixture(scope="module")
def original(resfeat, tmp_path_factory):
    """A folder and its dataset. Not to be changed."""
    folder = tmp_path_factory.mktemp("original")
    Collection(folder / "source", COUNT)
    done = resfeat("extract", folder / "source", "-o", folder / "out", *FEATURES, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def case(original, resfeat):
    """The same, to be changed; `run` gives the command, in which later options win."""
    collection = Collection(original / "source", COUNT)
    output = original / "case"
    shutil.copytree(original / "out", output)
    command = ["extract", collection.folder, "-o", output, *FEATURES, *SMALL]
    yield SimpleNamespace(
        collection=collection, output=output, run=lambda *more: resfeat(*command, *more)
    )
    shutil.rmtree(output)
    shutil.rmtree(collection.folder, ignore_errors=True)


def everything(folder):
    """All that lies there, the reports and locks too, and when it was written."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def tree(output):
    """The same less what every run writes when it looks: who holds the lock, and when; and what it
    keeps its drafts in."""
    passed = ("_resfeat/locks", "_resfeat/tmp", "_resfeat/runs")
    return {path: what for path, what in everything(output).items() if not path.startswith(passed)}


def check_refused(case, code, *options, said):
    before, folders = tree(case.output), sorted(everything(case.output))
    done = case.run(*options)
    assert done.returncode == code, done.stderr
    assert re.search(said, line := error_of(done.stderr)), line
    assert "Traceback" not in done.stderr
    assert tree(case.output) == before
    # A run that was refused has done nothing that it could report.
    assert {each for each in everything(case.output) if "/tmp/" not in each} == {
        each for each in folders if "/tmp/" not in each
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "random:2"], "another weights_digest"),
        (["--model", "cifar_resnet32"], "another model: cifar_resnet20 there"),
        (["--shard-size", 5], "another shard_size"),
        (["--label-from", "parent"], "another label_from"),
        (["--partition", "1/2"], "--update is for the whole dataset and --partition for a part"),
        (["--max-gone", 2], "a share from 0 to 1"),
    ],
)
def test_other_choices(options, said, case):
    case.collection.change()
    check_refused(case, 2, "--update", *options, said=said)


@pytest.mark.parametrize(
    ("partition", "said"),
    [
        ("3/2", "--partition 3/2: give a number from 1 to 2"),
        ("0/2", "--partition 0/2: give a number from 1 to 2"),
        ("1/0", "--partition 1/0: "),
        ("half", "--partition half: give i/n"),
        ("1/2/3", "--partition 1/2/3: give i/n"),
        ("-1/2", "--partition -1/2: give i/n"),
        ("", "give i/n"),
        ("auto", "no scheduler's variables are here"),
        ("auto/", "no scheduler's variables are here"),
    ],
)
def test_partitions_that_make_no_sense(partition, said, case):
    check_refused(case, 2, "--partition", partition, said=re.escape(said))


def test_a_dataset_that_a_run_has_not_finished(case):
    case.collection.change()
    (case.output / "embeddings" / "part-00001.parquet").unlink()
    said = r"is not finished, 1 of 6 shards are left: give the same command without --update first"
    check_refused(case, 2, "--update", said=said)
    check_refused(case, 2, "--update", "--dry-run", said=said)


def test_a_source_that_is_empty_or_missing(case):
    shutil.rmtree(case.collection.folder)
    check_refused(case, 2, "--update", said="does not exist")
    case.collection.folder.mkdir()
    for more in ([], ["--max-gone", 1], ["--dry-run"]):
        check_refused(case, 2, "--update", *more, said="no images in")


def test_more_gone_than_is_likely(case, resfeat):
    collection = case.collection
    for name in sorted(collection.names)[:3]:
        collection.remove(name)
    collection.put("new.jpg")
    said = r"3 of the 24 images of .* are gone .*12.5%.*--max-gone 10.0%.*give --max-gone 0\.13"
    check_refused(case, 1, "--update", said=said)
    check_refused(case, 1, "--update", "--max-gone", 0, said="more than --max-gone 0.0%")
    done = case.run("--update", "--max-gone", 0.13)
    assert done.returncode == 0 and "1 added, 0 changed, 3 removed, 21 kept" in done.stdout


def test_exactly_as_many_gone_as_is_likely(case):
    collection = case.collection
    for name in sorted(collection.names)[:3]:
        collection.remove(name)
    assert case.run("--update", "--max-gone", 0.125).returncode == 0


def test_another_collection_in_the_same_place_is_not_likely(case):
    collection = case.collection
    for name in sorted(collection.names):
        collection.remove(name)
    for number in range(50):
        collection.put(f"other/{number}.jpg")
    check_refused(case, 1, "--update", said=r"24 of the 24 images .* 100\.0%")


def preview(case, *options):
    """What --dry-run says, as people and programs are told; nothing is written."""
    there = case.output.exists() and everything(case.output)
    told = case.run("--dry-run", *options)
    for_programs = case.run("--dry-run", "--log-json", *options)
    assert (case.output.exists() and everything(case.output)) == there
    assert told.returncode == for_programs.returncode
    found = json.loads(for_programs.stdout.splitlines()[-1])
    assert found.pop("event") == "preview"
    return told, found


def test_a_dry_run_of_a_first_run(case, resfeat):
    shutil.rmtree(case.output)
    told, found = preview(case)
    assert told.returncode == 0 and not case.output.exists()
    assert "To do: 24 of 24 images in 6 shards of " in told.stdout
    assert "how long is not known yet" in told.stdout
    assert (found["items"], found["images"], found["shards"]) == (24, 24, 6)
    assert found["update"] is None and found["rate"] is None and found["seconds"] is None
    assert case.run().returncode == 0
    assert (last_report(case.output)["images"], last_report(case.output)["shards"]) == (24, 6)


def test_a_dry_run_of_an_update_says_what_the_update_then_does(case):
    made = case.collection.change()
    told, found = preview(case, "--update")
    assert told.returncode == 0
    rate = last_report(case.output)["images_per_second"]
    assert case.run("--update").returncode == 0
    report = last_report(case.output)
    assert found["update"] == report["update"]
    assert found["images"] == report["images"] == len(made.to_read)
    assert (found["items"], found["shards"]) == (report["items"], report["shards"])
    assert found["rate"] == rate
    assert found["seconds"] == pytest.approx(found["images"] / rate, abs=0.05)
    assert f"Update: {len(made.added)} added, {len(made.changed)} changed" in told.stdout
    assert f"at the last run's {rate:,.1f} images/s" in told.stdout
    # And then there is nothing left to do; the rate is that of the last run that did something.
    assert case.run().returncode == 0
    told, found = preview(case, "--update")
    assert "To do: 0 of" in told.stdout and found["rate"] == report["images_per_second"]


def test_a_dry_run_of_an_update_that_would_be_refused(case):
    for name in sorted(case.collection.names)[:3]:
        case.collection.remove(name)
    told, found = preview(case, "--update")
    assert told.returncode == 1
    assert "0 added, 0 changed, 3 removed, 21 kept" in told.stdout
    assert "--max-gone 0.13" in error_of(told.stderr) and "--max-gone 0.13" in found["refusal"]


def test_a_dry_run_of_a_resume(case):
    (case.output / "embeddings" / "part-00001.parquet").unlink()
    rows = every_row(case.output)
    told, found = preview(case)
    assert "To do: 4 of 24 images in 1 shards" in told.stdout
    assert (found["images"], found["shards"]) == (4, 1)
    told, found = preview(case, "--partition", "1/2")
    assert found["images"] == 0
    assert every_row(case.output) == rows
