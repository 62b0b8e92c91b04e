"""Updates of tars, tables and Parquet that were written again: each as a fresh extraction."""

import datetime
import io
import os
import tarfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changing import FEATURES, SMALL, Collection, every_row, last_report, parts_of, picture

from resfeat import open_dataset
from resfeat.dataset.verify import verify

FIRST = list(range(20))
# One is gone, two are new, and what stays lies in another order.
LATER = [30, *FIRST[:0:-1], 31]


@pytest.fixture
def check(resfeat, tmp_path):
    """`write(first)` and `write(later)`, each followed by a run: the second is to end as a fresh
    extraction does. Gives the dataset."""

    def run(source, *options, output, update=False):
        more = ["--update", "--max-gone", 0.2] if update else []
        done = resfeat("extract", source, "-o", output, *FEATURES, *SMALL, *options, *more)
        assert done.returncode == 0, done.stderr

    def check(source, write, *options, first=FIRST, later=LATER):
        output, fresh = tmp_path / "out", tmp_path / "fresh"
        write(first)
        os.utime(source, (1_600_000_000, 1_600_000_000))
        run(source, *options, output=output)
        lay = parts_of(output)
        run(source, *options, output=output, update=True)
        assert last_report(output)["update"] == {
            "added": 0, "changed": 0, "removed": 0, "kept": len(first)
        }  # fmt: skip
        write(later)
        os.utime(source, (1_700_000_000, 1_700_000_000))
        run(source, *options, output=output, update=True)
        run(source, *options, output=fresh)
        assert every_row(output) == every_row(fresh)
        lies = parts_of(output)
        assert all(lay[each] == part for each, part in lies.items() if each in lay)
        assert verify(open_dataset(output)).problems == []
        return SimpleNamespace(output=output, report=last_report(output))

    return check


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_tar(suffix, check, tmp_path):
    path = tmp_path / f"shard.{suffix}"

    def write(numbers):
        with tarfile.open(path, "w:gz" if suffix == "tar.gz" else "w") as tar:
            for number in numbers:
                content = {"jpg": picture(number), "txt": f"{number} in {len(numbers)}".encode()}
                for extension, data in content.items():
                    member = tarfile.TarInfo(f"{number:02}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    done = check(path, write, "--keep", "txt")
    expected = {"added": 2, "changed": 19, "removed": 1, "kept": 0}
    assert done.report["update"] == expected  # of another file, nobody knows what is the same in it


def test_rows_of_parquet_by_a_column_of_ids(check, tmp_path):
    path = tmp_path / "rows.parquet"

    def write(numbers):
        images = pa.array([picture(number) for number in numbers], pa.binary())
        table = {"key": [f"k{number}" for number in numbers], "image": images, "price": numbers}
        pq.write_table(pa.table(table), path, row_group_size=6)

    done = check(path, write, "--id-column", "key", "--keep", "price")
    assert done.report["update"] == {"added": 2, "changed": 19, "removed": 1, "kept": 0}


def test_rows_of_parquet_by_their_places(check, tmp_path):
    path = tmp_path / "rows.parquet"

    def write(numbers):
        images = pa.array([picture(number) for number in numbers], pa.binary())
        pq.write_table(pa.table({"image": images}), path)

    done = check(path, write, later=LATER[:18])
    assert done.report["update"] == {"added": 0, "changed": 18, "removed": 2, "kept": 0}


# Types that Parquet does not give back as they were, and such as are easily compared wrongly.
KEPT = {
    "seconds": pa.timestamp("s"),
    "of_day": pa.time32("s"),
    "day": pa.date64(),
    "text": pa.string_view(),
    "number": pa.float64(),
    "tags": pa.list_(pa.string()),
}
VALUES = {
    "seconds": datetime.datetime(2024, 1, 2),
    "of_day": datetime.time(1, 2, 3),
    "day": datetime.date(2024, 1, 2),
    "text": "x",
    "number": float("nan"),
    "tags": ["a", None],
}


def test_a_table_of_paths_with_columns(check, tmp_path):
    """Rows whose columns changed are other images, too; those that did not are not read."""
    collection, path = Collection(tmp_path / "images", 40), tmp_path / "table.arrow"
    names = sorted(collection.good)

    def write(numbers):
        columns = {
            name: pa.array([VALUES[name] if number % 5 else None for number in numbers], kind)
            for name, kind in KEPT.items()
        }
        changed = ["new" if len(numbers) > 20 and number == 4 else "" for number in numbers]
        paths = [str(collection.folder / names[number]) for number in numbers]
        table = pa.table({"path": paths, "word": changed, **columns})
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)

    keep = ",".join(["word", *KEPT])
    options = ["--uri-column", "path", "--keep", keep]
    done = check(path, write, *options)
    assert done.report["update"] == {"added": 2, "changed": 1, "removed": 1, "kept": 18}
    assert done.report["images"] == 3


def test_a_list_of_paths(check, tmp_path):
    collection, path = Collection(tmp_path / "images", 40), tmp_path / "list.txt"
    names = sorted(collection.good)

    def write(numbers):
        path.write_text("".join(f"images/{names[number]}\n" for number in numbers))

    done = check(path, write)
    assert done.report["update"] == {"added": 2, "changed": 0, "removed": 1, "kept": 19}
