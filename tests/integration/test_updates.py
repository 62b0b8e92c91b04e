"""--update: the dataset follows its source, reads what is new or changed, and nothing else."""

import json
import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from changing import (
    FEATURES,
    SMALL,
    Collection,
    content,
    every_row,
    last_report,
    parts_of,
    rows_of,
)

from resfeat import open_dataset
from resfeat.dataset import Layout, Record
from resfeat.dataset.verify import Problem, Verification, repair, verify
from resfeat.errors import ResfeatError

COUNT = 40


@pytest.fixture
def fresh(resfeat, tmp_path):
    """What a first extraction of a folder gives."""

    def extract(folder):
        output = tmp_path / "fresh"
        shutil.rmtree(output, ignore_errors=True)
        done = resfeat("extract", folder, "-o", output, *FEATURES, *SMALL)
        assert done.returncode == 0, done.stderr
        return every_row(output)

    return extract


@pytest.fixture
def case(resfeat, tmp_path):
    """A collection and its dataset; `extract` gives the command again, with more options."""
    collection = Collection(tmp_path / "source", COUNT)
    output = tmp_path / "out"

    def extract(*options, code=0):
        done = resfeat("extract", collection.folder, "-o", output, *FEATURES, *SMALL, *options)
        assert done.returncode == code, done.stderr
        return done

    extract()
    return SimpleNamespace(collection=collection, output=output, extract=extract)


def check_sound(output):
    """Verified, and in the plan's folder what the record names, alone."""
    dataset = open_dataset(output)
    assert verify(dataset).problems == []
    named = {file.name for file in dataset.record.plan.files}
    assert {path.name for path in dataset.layout.plan.iterdir()} == named
    assert not list(dataset.layout.tmp.iterdir())
    return dataset


def counts(made, collection):
    numbers = {name: len(names) for name, names in vars(made).items()}
    return numbers | {"kept": len(collection.names) - len(made.to_read)}


@pytest.mark.parametrize(
    ("seed", "turns"), [(0, 5), *(pytest.param(s, 10, marks=pytest.mark.more) for s in (1, 2))]
)
def test_updates_in_a_row(seed, turns, case, fresh):
    collection, output = case.collection, case.output
    collection._chance.seed(seed)
    lay, seen, returned = parts_of(output), set(collection.names), 0
    for turn in range(1, turns + 1):
        made = collection.change()
        returned += len(made.added & seen)
        seen |= made.added
        with collection.concealed(collection.names - made.to_read):
            done = case.extract("--update")
        assert every_row(output) == fresh(collection.folder), turn
        dataset = check_sound(output)
        assert dataset.record.plan.generation == turn
        lies = parts_of(output)
        assert all(lay[each] == part for each, part in lies.items() if each in lay)
        # What was never there is in parts of its own.
        assert not {lies[each] for each in made.added - lay.keys()} & set(lay.values())
        lay |= lies
        expected, report = counts(made, collection), last_report(output)
        assert report["update"] == expected
        assert report["images"] == len(made.to_read)
        told = ", ".join(f"{count:,} {name}" for name, count in expected.items())
        assert f"Update: {told}, {report['images_failed']} failed" in done.stdout
        changes = dataset.changes(turn - 1).to_pylist()
        assert sorted((each["change"], each["id"]) for each in changes) == sorted(
            (kind, each) for kind, names in vars(made).items() for each in names
        )
    assert returned > turns // 3


def test_where_nothing_changed_nothing_is_written_but_the_report(case):
    case.collection.change()
    case.extract("--update")
    before, reports = content(case.output), len(list(Layout(case.output).runs.iterdir()))
    with case.collection.concealed(case.collection.names):
        done = case.extract("--update")
    assert "nothing was left to do" in done.stdout
    assert "Update: 0 added, 0 changed, 0 removed" in done.stdout
    assert content(case.output) == before
    assert len(list(Layout(case.output).runs.iterdir())) == reports + 1
    assert last_report(case.output)["update"]["kept"] == len(case.collection.names)


def test_untouched_parts_are_not_written(case):
    collection = case.collection
    name = sorted(collection.good)[5]
    part, before = parts_of(case.output)[name], content(case.output)
    collection.put(name)
    case.extract("--update")
    now = content(case.output)
    changed = {path for path in before if before[path] != now.get(path)}
    assert f"embeddings/{part}" in changed
    parts = {path.rpartition("/")[2] for path in changed if path.startswith(("emb", "fail"))}
    assert parts == {part}


def test_a_part_may_lose_all_its_images_and_get_them_back(case, fresh):
    collection, output = case.collection, case.output
    lay = parts_of(output)
    emptied = [name for name, part in lay.items() if part == "part-00002.parquet"]
    assert len(emptied) == 4
    for name in emptied:
        collection.remove(name)
    case.extract("--update", "--max-gone", 0.2)
    assert every_row(output) == fresh(collection.folder)
    check_sound(output)
    assert "part-00002.parquet" in {part.name for part in (output / "embeddings").iterdir()}
    for name in emptied[:3]:
        collection.put(name)
    case.extract("--update")
    assert every_row(output) == fresh(collection.folder)
    check_sound(output)
    assert {parts_of(output)[name] for name in emptied[:3]} == {"part-00002.parquet"}


def test_an_update_of_what_is_not_there_yet_is_a_first_run(resfeat, fresh, tmp_path):
    collection = Collection(tmp_path / "source", 8)
    command = ["extract", collection.folder, "-o", tmp_path / "out", *FEATURES, *SMALL]
    done = resfeat(*command, "--update")
    assert done.returncode == 0, done.stderr
    assert every_row(tmp_path / "out") == fresh(collection.folder)


def test_failures_that_did_not_change_are_left_and_with_retry_failed_done_again(case, fresh):
    collection = case.collection
    name, other = sorted(collection.bad)[:2]
    status = (collection.folder / name).stat()
    collection.put(other)  # mended, and seen to be
    mended = (collection.folder / other).read_bytes()
    (collection.folder / name).write_bytes(mended)  # mended as well, and not to be seen
    collection._as_of({collection.folder / name: status})
    collection.put(sorted(collection.good)[0])
    case.extract("--update")
    rows = every_row(case.output)
    assert name in rows["failures"] and other in rows["embeddings"]
    case.extract("--update", "--retry-failed")
    assert every_row(case.output) == fresh(collection.folder)
    assert name in every_row(case.output)["embeddings"]
    # Both at once: what failed before, and what is new.
    collection.change()
    broken = sorted(collection.bad)[0]
    status = (collection.folder / broken).stat()
    (collection.folder / broken).write_bytes(mended)
    collection._as_of({collection.folder / broken: status})
    case.extract("--update", "--retry-failed")
    assert every_row(case.output) == fresh(collection.folder)
    check_sound(case.output)


def test_an_index_can_follow_by_changes(case):
    """Whoever applies the changes since what he has holds what the dataset holds."""
    collection, output = case.collection, case.output
    holding, has = {}, -1
    for turn in range(6):
        if turn:
            collection.change()
            case.extract("--update")
        if turn in (0, 1, 3, 5):
            dataset = open_dataset(output)
            now = {row["id"]: row for row in rows_of(dataset.embeddings.to_table())}
            changes = dataset.changes(has) if has >= 0 else None
            changed = changes["id"].to_pylist() if changes else list(now)
            assert len(set(changed)) == len(changed)
            for each in changed:
                holding.pop(each, None)
                if each in now:
                    holding[each] = now[each]
            assert holding == now
            has = dataset.record.plan.generation
    assert len(dataset.changes(has)) == 0


def test_a_damaged_part_is_not_carried_over_and_repair_works_in_a_generation(
    case, fresh, resfeat, tmp_path
):
    collection, output = case.collection, case.output
    collection.change()
    case.extract("--update")
    new = Layout(output).committed()[-1]
    in_it = [each for each, part in parts_of(output).items() if part == Layout.part_name(1)]
    for shard in (1, new):
        path = Layout(output).embeddings / Layout.part_name(shard)
        group = pq.read_metadata(path).row_group(0)
        (embedding,) = (
            chunk for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema.startswith("embedding")
        )  # fmt: skip
        data = bytearray(path.read_bytes())
        data[embedding.data_page_offset + embedding.total_compressed_size // 2] ^= 1
        path.write_bytes(data)
    for name in in_it[:2]:
        collection.put(name)
    done = case.extract("--update", code=1)
    assert "resfeat verify --repair" in done.stderr.splitlines()[-1]
    found = resfeat("verify", output)
    assert found.returncode == 1 and "it was changed after its commit" in found.stdout
    resfeat("verify", output, "--repair")
    assert {1, new}.isdisjoint(Layout(output).committed())
    case.extract()
    assert every_row(output) == fresh(collection.folder)
    check_sound(output)
    assert resfeat("verify", output).returncode == 0


def test_what_was_opened_before_an_update_is_not_judged_by_it(case):
    """Its plan is another one by now: what fits the new one is no damage."""
    before = open_dataset(case.output)
    case.collection.change()
    case.extract("--update")
    parts = {path: path.read_bytes() for path in (case.output / "embeddings").iterdir()}
    again = pytest.raises(ResfeatError, match=r"an update changed .*: verify it again")
    with again:
        verify(before)
    with again:
        repair(before, Verification(problems=[Problem("rows", 0, "", "")]))
    assert {path: path.read_bytes() for path in (case.output / "embeddings").iterdir()} == parts
    now = open_dataset(case.output)
    gone = [row["id"] for row in now.changes(0).to_pylist() if row["change"] == "removed"]
    some = now.embeddings.to_table(["id"])["id"].to_pylist()[:2]
    assert set(before.items([*some, *gone])) == set(some)


def test_status_tells_the_generation(case, resfeat):
    def status():
        return json.loads(resfeat("status", case.output, "--json").stdout)

    assert status()["generation"] == 0
    made = case.collection.change()
    case.extract("--update")
    told = status()
    assert told["generation"] == 1 and told["complete"]
    assert told["images"] == len(case.collection.names) and made.removed
    assert told["failed"] == len(case.collection.bad)
    assert told["embedded"] == len(case.collection.good)
    record = Record.load(Layout(case.output))
    assert f"Embeddings of {record.plan.items:,} images" in (case.output / "README.md").read_text()
