"""`resfeat verify`: each kind of damage is named, alone; --repair has it done again, alone."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import start
from integration.test_resume import wait_for_parts
from tables import planned, rows, vectors

from resfeat.dataset import Layout, open_dataset
from resfeat.dataset.verify import CHECKS
from resfeat.errors import ResfeatError

SHARD = 1


def copy(dataset, folder):
    shutil.copytree(dataset, folder / "out")
    return Layout(folder / "out")


def failing(layout):
    """The first shard that has failures."""
    return layout.with_failures()[0]


def part(layout, shard=SHARD):
    return layout.embeddings / layout.part_name(shard)


def failures(layout):
    return layout.failures / layout.part_name(failing(layout))


def rewrite(layout, change, *, noted=False):
    """Write a part anew, changed. noted: as if it had been committed like that."""
    pq.write_table(change(pq.read_table(part(layout))), part(layout), compression="zstd")
    if noted:
        note(layout)


def note(layout):
    place = layout.note(SHARD)
    content = json.loads(place.read_text())
    content["digests"]["embeddings"] = hashlib.sha256(part(layout).read_bytes()).hexdigest()
    place.write_text(json.dumps(content))


def with_vector(value):
    """Another vector in the sixth row."""

    def change(table):
        every = vectors(table).copy()
        every[5] = value
        column = table.schema.field("embedding")
        lists = pa.FixedSizeListArray.from_arrays(pa.array(every.reshape(-1)), type=column.type)
        return table.set_column(table.schema.names.index("embedding"), column, lists)

    return change


def with_id(place, name):
    def change(table):
        ids = table["id"].to_pylist()
        ids[place] = name
        return table.set_column(0, table.schema.field("id"), pa.array(ids))

    return change


def of_another(table):
    described = json.loads(table.schema.metadata[b"resfeat"])
    described["fingerprint"] = "0" * 64
    return table.replace_schema_metadata({"resfeat": json.dumps(described)})


# Each damages a dataset and gives what must be said of it, {(check, file)}, and no more.


def truncated(layout):
    os.truncate(part(layout), 1000)
    return {("checksum", part(layout)), ("unreadable", part(layout))}


def emptied(layout):
    os.truncate(part(layout), 0)
    return {("checksum", part(layout)), ("unreadable", part(layout))}


def deleted(layout):
    part(layout).unlink()
    return {("missing", part(layout))}


def failures_deleted(layout):
    gone = failures(layout)
    wanting = part(layout, failing(layout))
    gone.unlink()
    return {("missing", gone), ("rows", wanting)}


def failures_truncated(layout):
    os.truncate(failures(layout), 100)
    return {("checksum", failures(layout)), ("unreadable", failures(layout))}


def byte_flipped(layout):
    data = bytearray(part(layout).read_bytes())
    data[len(data) // 2] ^= 1
    part(layout).write_bytes(data)
    pq.read_table(part(layout))  # nobody else would notice
    return {("checksum", part(layout))}


def row_dropped(layout):
    rewrite(layout, lambda table: table.slice(1), noted=True)
    return {("rows", part(layout))}


def row_doubled(layout):
    rewrite(layout, lambda table: pa.concat_tables([table, table.slice(0, 1)]), noted=True)
    return {("rows", part(layout))}


def id_of_another_shard(layout):
    rewrite(layout, with_id(0, planned(layout, SHARD + 1)[0].id), noted=True)
    return {("rows", part(layout))}


def id_of_a_row_before(layout):
    rewrite(layout, with_id(1, planned(layout, SHARD)[0].id), noted=True)
    return {("rows", part(layout))}


def part_of_another_dataset(layout):
    rewrite(layout, of_another, noted=True)
    return {("identity", part(layout))}


def part_that_says_nothing_of_its_identity(layout):
    rewrite(layout, lambda table: table.replace_schema_metadata(None), noted=True)
    return {("identity", part(layout))}


def written_anew_with_pandas(layout):
    rewrite(layout, lambda table: pa.Table.from_pandas(table.to_pandas()), noted=True)
    return {("unreadable", part(layout))}


def checksum_deleted(layout):
    layout.note(SHARD).unlink()
    said = {("checksum", part(layout))}
    if (layout.failures / layout.part_name(SHARD)).exists():
        said.add(("checksum", layout.failures / layout.part_name(SHARD)))
    return said


def nan(layout):
    rewrite(layout, with_vector([np.nan, *[1.0] * 511]), noted=True)
    return {("values", part(layout))}


def infinite(layout):
    rewrite(layout, with_vector(np.inf), noted=True)
    return {("values", part(layout))}


def zero(layout):
    rewrite(layout, with_vector(0), noted=True)
    return {("values", part(layout))}


def constant(layout):
    rewrite(layout, with_vector(0.25), noted=True)
    return {("values", part(layout))}


def foreign_parquet(layout):
    foreign = layout.embeddings / "export.parquet"
    shutil.copy(part(layout), foreign)
    return {("foreign", foreign)}


def part_beyond_the_plan(layout):
    foreign = layout.failures / "part-00099.parquet"
    shutil.copy(failures(layout), foreign)
    return {("foreign", foreign)}


def foreign_folder(layout):
    foreign = layout.embeddings / "old"
    foreign.mkdir()
    shutil.copy(part(layout), foreign)
    assert len(rows(layout.root)) > 500  # readers go into it
    return {("foreign", foreign)}


def plan_truncated(layout):
    os.truncate(layout.plan / "plan-00000.parquet", 1000)
    return {("plan", layout.plan / "plan-00000.parquet")}


def never_done(layout):
    part(layout).unlink()
    layout.note(SHARD).unlink()
    (layout.failures / layout.part_name(SHARD)).unlink(missing_ok=True)
    return {("unfinished", part(layout))}


DAMAGES = [
    truncated, emptied, deleted, failures_deleted, failures_truncated, byte_flipped, row_dropped,
    row_doubled, id_of_another_shard, id_of_a_row_before, part_of_another_dataset,
    part_that_says_nothing_of_its_identity, written_anew_with_pandas, checksum_deleted, nan,
    infinite, zero, constant, foreign_parquet, part_beyond_the_plan, foreign_folder, plan_truncated,
    never_done,
]  # fmt: skip


def test_of_a_good_dataset_nothing_is_wrong(inline, tmp_path, resfeat):
    layout = copy(inline, tmp_path)
    done = resfeat("verify", layout.root)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.rsplit(maxsplit=1) for line in lines[:-2]] == [
        [check, "yes"] for check in CHECKS.values()
    ]
    # Counted by other means: pyarrow's rows, and numpy's idea of what is equal.
    equal = 500 - len(np.unique(vectors(rows(inline)), axis=0))
    assert lines[-2:] == [
        f"500 embedded and 12 failed in 4 shards; {equal} have the same embedding as another",
        "Nothing is wrong",
    ]
    told = json.loads(resfeat("verify", layout.root, "--json", "--repair").stdout)
    assert told == {
        "shards": 4, "unseen": 0, "embedded": 500, "failed": 12, "duplicates": equal,
        "problems": [], "bad_shards": [], "sent_back": [],
    }  # fmt: skip


def test_it_leaves_no_thread_behind_that_could_abort_the_exit(inline):
    """Arrow's own threads abort a process that ends while they let go of what is Python's: about
    once in a hundred runs, so the threads are counted instead."""
    script = """
import os, sys, time
from resfeat.dataset import open_dataset
from resfeat.dataset.verify import verify
dataset = open_dataset(sys.argv[1])
before = len(os.listdir("/proc/self/task"))
assert verify(dataset).problems == []
deadline = time.monotonic() + 5  # our own have ended, and take a moment to be gone
while (more := len(os.listdir("/proc/self/task")) - before) and time.monotonic() < deadline:
    time.sleep(0.01)
print(more)
"""
    done = subprocess.run([sys.executable, "-c", script, inline], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_each_damage_is_named_and_nothing_else(damage, inline, tmp_path, resfeat):
    layout = copy(inline, tmp_path)
    expected = damage(layout)

    told = resfeat("verify", layout.root, "--json")
    assert told.returncode == 1 and told.stderr == ""
    found = json.loads(told.stdout)
    assert {(each["kind"], each["path"]) for each in found["problems"]} == {
        (kind, str(path)) for kind, path in expected
    }
    assert len(found["problems"]) == len(expected)

    done = resfeat("verify", layout.root)
    assert done.returncode == 1 and done.stderr == ""
    table = done.stdout.splitlines()
    assert table[-1].startswith(("Wrong", "Unfinished"))
    kinds = {kind for kind, _ in expected}
    for kind, check in CHECKS.items():
        place = next(place for place, line in enumerate(table) if line.startswith(check))
        assert table[place].endswith("wrong" if kind in kinds else "yes")
        if kind in kinds:
            assert (
                table[place + 1]
                .strip()
                .startswith(tuple(f"{path}: " for other, path in expected if other == kind))
            )


def test_damage_that_a_reader_meets_half_way_is_one_line(inline, tmp_path):
    layout = copy(inline, tmp_path)
    for path in (part(layout), layout.plan / "plan-00000.parquet"):
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    dataset = open_dataset(layout.root)
    for what, use in (
        (part(layout), lambda: list(dataset.vectors())),
        (layout.plan, lambda: dataset.items([planned(Layout(inline), 0)[0].id])),
    ):
        with pytest.raises(ResfeatError, match=rf"^{what}.* cannot be read \(.*\): ") as told:
            use()
        assert "\n" not in str(told.value)


def test_damage_in_several_shards_is_mended_by_repair_and_the_same_command(
    inline, collection, choices, tmp_path, resfeat
):
    layout = copy(inline, tmp_path)
    truncated(layout)
    failures_deleted(layout)
    bad = sorted({SHARD, failing(Layout(inline))})
    last = max(layout.committed())
    assert last not in bad
    layout.note(last).write_text(layout.note(last).read_text().replace("digests", "digest"))
    bad.append(last)
    good = {path: path.stat().st_mtime_ns for path in layout.embeddings.iterdir()}
    for shard in bad:
        del good[part(layout, shard)]
    assert good

    done = resfeat("verify", layout.root, "--repair")
    assert done.returncode == 1
    assert f"Sent back: {len(bad)} shards" in done.stdout
    assert layout.committed() == [each for each in range(4) if each not in bad]
    told = json.loads(resfeat("verify", layout.root, "--json").stdout)
    assert {each["kind"] for each in told["problems"]} == {"unfinished"}
    assert told["bad_shards"] == bad

    again = resfeat("extract", collection, "-o", layout.root, "--workers", 0, *choices)
    assert again.returncode == 0, again.stderr
    assert f"This run: {sum(len(planned(layout, shard)) for shard in bad)} images" in again.stdout
    for folder in ("embeddings", "failures", "_resfeat/checksums", "_resfeat/plan"):
        files = {path.name: path.read_bytes() for path in (layout.root / folder).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (inline / folder).iterdir()}
    assert {path: path.stat().st_mtime_ns for path in good} == good
    assert "Nothing is wrong" in resfeat("verify", layout.root).stdout


def test_repair_touches_nothing_where_no_shard_is_to_blame(inline, tmp_path, resfeat):
    """Least of all where the plan is gone: what it listed could not be done again."""
    layout = copy(inline, tmp_path)
    plan_truncated(layout)
    foreign_parquet(layout)
    before = {path: path.stat().st_mtime_ns for path in layout.root.rglob("*.*")}
    done = resfeat("verify", layout.root, "--repair")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "Wrong, and no shard is to blame: see above"
    assert {path: path.stat().st_mtime_ns for path in layout.root.rglob("*.*")} == before


def test_a_dataset_that_is_being_written(collection, choices, unhurried, tmp_path, resfeat):
    output = tmp_path / "out"
    writer = start("extract", collection, "-o", output, *choices, "--workers", 0,
                   "--shard-size", 32, env=unhurried)  # fmt: skip
    wait_for_parts(writer, output, 2)
    looked = json.loads(resfeat("verify", output, "--json").stdout)
    assert {each["kind"] for each in looked["problems"]} == {"unfinished"}
    assert looked["embedded"] >= 32

    part(Layout(output), Layout(output).committed()[0]).unlink()
    refused = resfeat("verify", output, "--repair")
    assert writer.poll() is None
    assert refused.returncode == 1
    (line,) = refused.stderr.strip().splitlines()
    assert f"is being written by process {writer.pid}" in line

    writer.send_signal(signal.SIGTERM)
    writer.communicate(timeout=60)
    sent = json.loads(resfeat("verify", output, "--repair", "--json").stdout)
    assert len(sent["sent_back"]) == 1  # the others have nothing to be removed
    stopped = resfeat("verify", output)
    assert stopped.returncode == 1
    assert "Unfinished, and nothing is damaged" in stopped.stdout


def test_equal_images_are_counted_and_are_no_error(photos, tmp_path, resfeat):
    folder = tmp_path / "some"
    folder.mkdir()
    some = sorted(photos.rglob("*.*"))[:100:20]
    for number, photo in enumerate([*some, some[0], some[0], some[3]]):
        (folder / f"{number}{photo.suffix}").hardlink_to(photo)
    output = tmp_path / "out"
    done = resfeat("extract", folder, "-o", output, "--model", "cifar_resnet20",
                   "--weights", "random:0", "--workers", 0, "--batch-size", 4)  # fmt: skip
    assert done.returncode == 0, done.stderr
    verified = resfeat("verify", output)
    assert verified.returncode == 0
    assert "8 embedded and 0 failed in 1 shards; 3 have the same" in verified.stdout


def test_what_is_no_dataset_is_one_line(tmp_path, resfeat):
    for there in (tmp_path, tmp_path / "nowhere"):
        done = resfeat("verify", there)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = done.stderr.strip().splitlines()
        assert f"no resfeat dataset at {there}" in line
