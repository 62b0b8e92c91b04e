"""Images in rows of Parquet and Arrow files."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from later import Later
from object_store import FaultyProxy, ObjectStore
from small import embed, embedded_pictures, failures_of, image_table, vectors_of
from tables import rows

from resfeat.dataset import open_dataset
from resfeat.downstream import Tile, contact_sheet
from resfeat.errors import Failure, UsageError
from resfeat.sources import Item, cells, item_of, listing, read, read_ahead, runs
from resfeat.spec import SourceOptions
from resfeat.storage import remote as stores

datasets = Later("datasets")
pandas = Later("pandas")
polars = Later("polars")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return embedded_pictures(tmp_path_factory.mktemp("pictures"))


def listed(*sources, **options):
    return list(listing(list(map(str, sources)), SourceOptions(**options)))


def contents_of(items):
    """What the runs of these items read."""
    found = []
    for run in runs(items, range(len(items)), 4):
        assert {place // 4 for place in run.places} == {run.places[0] // 4}
        found += run.read()
    return found


def features():
    return datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})


def by_datasets(paths: list[Path]) -> datasets.Dataset:
    rows = {"image": [str(path) for path in paths], "n": list(range(len(paths)))}
    return datasets.Dataset.from_dict(rows, features=features())


def write(kind: str, paths: list[Path], folder: Path) -> Path:
    """The pictures in rows, by one of those who often write such files."""
    plain = {"image": [path.read_bytes() for path in paths], "n": list(range(len(paths)))}
    match kind:
        case "datasets":
            by_datasets(paths).to_parquet(folder / "t.parquet", batch_size=4)
        case "saved":
            by_datasets(paths).map(lambda row: row, writer_batch_size=2).save_to_disk(
                folder / "t", num_shards=2
            )
            return folder / "t"
        case "splits":
            every = by_datasets(paths)
            some = {"train": every.select(range(5)), "test": every.select(range(5, len(paths)))}
            datasets.DatasetDict(some).save_to_disk(folder / "t")
            return folder / "t"
        case "pandas":
            pandas.DataFrame(plain).to_parquet(folder / "t.parquet")
        case "polars":
            polars.DataFrame(plain).write_parquet(folder / "t.parquet", row_group_size=3)
        case "parquet":
            pq.write_table(image_table(paths), folder / "t.parquet")
        case "arrow":
            polars.DataFrame(plain).write_ipc(folder / "t.arrow", compat_level=None)
            return folder / "t.arrow"
    return folder / "t.parquet"


KINDS = ["datasets", "saved", "splits", "pandas", "polars", "arrow"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_the_bits_of_the_directory(pictures, tmp_path, kind):
    paths, expected = pictures
    source = write(kind, paths, tmp_path)
    report = embed(tmp_path / "out", source, keep=("n",), label_from="parent")
    assert (report.embedded, report.failed, report.changed) == (len(paths), 0, 0)
    assert sorted(vectors_of(tmp_path / "out").values()) == expected
    table = rows(tmp_path / "out")
    assert sorted(table["n"].to_pylist()) == list(range(len(paths)))
    names = {name.partition("#")[0] for name in table["id"].to_pylist()}
    assert all(name.endswith((".parquet", ".arrow")) for name in names)
    if kind == "splits":
        assert set(table["label"].to_pylist()) == {"train", "test"}


def test_a_saved_dataset_is_what_its_state_says(pictures, tmp_path):
    """Beside its files may lie those of what was computed of it."""
    paths, _ = pictures
    source = write("saved", paths, tmp_path)
    shutil.copy(source / "data-00000-of-00002.arrow", source / "cache-1.arrow")
    assert len(listed(source)) == len(paths)
    (source / "state.json").unlink()
    assert len(listed(source)) == len(paths) + 5


def test_what_is_known_of_a_row(pictures, tmp_path):
    paths, _ = pictures
    path = tmp_path / "t.parquet"
    pq.write_table(image_table(paths, n=list(range(len(paths)))), path, row_group_size=4)
    there = listed(path)
    assert [item.id for item in there] == [f"t.parquet#{n}" for n in range(len(paths))]
    expected = Item("t.parquet#5", path.as_uri(), None, path.stat().st_mtime_ns // 1000, offset=5,
                    column="image.bytes")  # fmt: skip
    assert there[5] == expected
    assert [item.id for item in listed(tmp_path / "*.parquet", id_column="n")][3] == "3"
    data, size, mtime = read(there[5])
    assert (data, size, mtime) == (paths[5].read_bytes(), len(data), expected.mtime)
    contents = list(read_ahead([there[n] for n in (7, 2, 2, 5)], 3))
    assert [content[0] for content in contents] == [paths[n].read_bytes() for n in (7, 2, 2, 5)]


def test_listing_reads_no_image(pictures, tmp_path):
    """Their pages are destroyed before it lists."""
    path = tmp_path / "t.parquet"
    table = image_table(pictures[0], n=list(range(len(pictures[0]))))
    pq.write_table(table, path, use_dictionary=False, compression="none")
    destroy(path, 0, "image.bytes")
    assert [item.carried for item in listed(path, keep=("n",))] == [(n,) for n in range(9)]


def destroy(path: Path, group: int, column: str) -> None:
    about = pq.read_metadata(path).row_group(group)
    chunks = (about.column(n) for n in range(about.num_columns))
    chunk = next(each for each in chunks if each.path_in_schema == column)
    with open(path, "r+b") as file:
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 64)


def test_a_broken_page_costs_only_its_row_group(pictures, tmp_path):
    paths, _ = pictures
    path = tmp_path / "t.parquet"
    pq.write_table(image_table(paths), path, row_group_size=3, use_dictionary=False)
    destroy(path, 1, "image.bytes")
    report = embed(tmp_path / "out", path)
    assert (report.embedded, report.failed) == (6, 3)
    lost = {f"t.parquet#{n}": "bad_container" for n in (3, 4, 5)}
    assert failures_of(tmp_path / "out") == lost


def test_rows_before_a_broken_page_are_read(pictures, tmp_path):
    """One by one, after what was read together has failed."""
    paths, _ = pictures
    path = tmp_path / "t.parquet"
    pq.write_table(image_table(paths * 4), path, use_dictionary=False, data_page_size=1,
                   write_batch_size=1, compression="none")  # fmt: skip
    items = listed(path)
    content = path.read_bytes()
    start = content.index(paths[2].read_bytes(), content.index(paths[8].read_bytes()))
    with open(path, "r+b") as file:
        file.seek(start - 40)  # the header of the page of row 11
        file.write(b"\xff" * 30)
    os.utime(path, ns=(items[0].mtime * 1000, items[0].mtime * 1000))
    found = contents_of(items)
    assert [isinstance(each, Failure) for each in found] == [False] * 11 + [True] * 25
    assert {each.reason for each in found[11:]} == {"bad_container"}


@pytest.mark.parametrize("change", ["replaced", "shorter", "other columns"])
def test_a_file_that_has_changed_since_gives_failures(pictures, tmp_path, change):
    paths, _ = pictures
    path = tmp_path / "t.parquet"
    pq.write_table(image_table(paths), path)
    items = listed(path)
    table = image_table(paths[:2] if change == "shorter" else paths)
    table = table.rename_columns(["other"]) if change == "other columns" else table
    pq.write_table(table, path)
    if change != "replaced":  # by one who keeps the time
        os.utime(path, ns=(items[0].mtime * 1000, items[0].mtime * 1000))
    found = contents_of(items)
    lost = found[2:] if change == "shorter" else found
    assert {each.reason for each in lost} == {"bad_container"}
    if change != "other columns":
        assert {each.message for each in lost} == {cells.CHANGED}
    path.unlink()
    assert read(items[0]).reason == "not_found"


def test_rows_that_say_where_their_image_is(pictures, tmp_path):
    """In a whole row group, which the listing sees, and among others, which reading does."""
    paths, expected = pictures
    images = image_table(paths)["image"].to_pylist()
    for n in (0, 1, 2, 4):
        images[n] = {"bytes": None, "path": os.path.relpath(paths[n], tmp_path)}
    images += [{"bytes": None, "path": None}, None, {"bytes": b"", "path": None}]
    kind = image_table(paths).schema.field("image").type
    pq.write_table(
        pa.table({"image": pa.array(images, kind)}), tmp_path / "t.parquet", row_group_size=3
    )
    there = listed(tmp_path / "t.parquet")
    assert [item.column for item in there] == [None] * 3 + ["image.bytes"] * 9
    report = embed(tmp_path / "out", tmp_path / "t.parquet")
    assert (report.embedded, report.failed) == (len(paths), 3)
    assert sorted(vectors_of(tmp_path / "out").values()) == expected
    assert set(failures_of(tmp_path / "out")) == {f"t.parquet#{n}" for n in (9, 10, 11)}


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """What Arrow holds while it reads 64 images of 1 MiB in one row group, a page each."""
    path = tmp_path / "t.parquet"
    table = pa.table({"image": [os.urandom(1024**2) for _ in range(64)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=1)
    del table
    assert pq.read_metadata(path).num_row_groups == 1
    items = listed(path)
    gc.collect()
    before, most, sizes = pa.total_allocated_bytes(), 0, []
    for run in runs(items, range(len(items)), 64):
        sizes.append(sum(size for _, size, _ in run.read()))
        most = max(most, pa.total_allocated_bytes() - before)
    assert sum(sizes) == 64 * 1024**2
    assert max(sizes) <= cells.BATCH_BYTES
    assert most < 40 * 1024**2


def test_only_wanted_rows_are_read(pictures, tmp_path):
    paths, _ = pictures
    path = tmp_path / "t.parquet"
    pq.write_table(image_table(paths), path, row_group_size=3, use_dictionary=False)
    items = listed(path)
    destroy(path, 0, "image.bytes")
    os.utime(path, ns=(items[0].mtime * 1000, items[0].mtime * 1000))
    (run,) = runs(items, [4, 7], 32)
    assert [content[0] for content in run.read()] == [paths[4].read_bytes(), paths[7].read_bytes()]


def test_which_column_has_the_images(pictures, tmp_path):
    paths, _ = pictures
    data = [path.read_bytes() for path in paths]
    many = pa.table({
        "left": data, "right": data, "both": [[each] for each in data], "n": [1] * len(data),
        "url": [str(path) for path in paths],
    })  # fmt: skip
    path = tmp_path / "t.parquet"
    pq.write_table(many, path)
    with pytest.raises(UsageError, match=r"several columns of bytes \(left, right\): say with"):
        listed(path)
    with pytest.raises(UsageError, match=r"column both has several images a row \(list<"):
        listed(path, image_column="both")
    with pytest.raises(UsageError, match=r"--image-column n: in .* it is int64, and has no bytes"):
        listed(path, image_column="n")
    with pytest.raises(UsageError, match=r"--image-column no: table .* it has left, right"):
        listed(path, image_column="no")
    with pytest.raises(UsageError, match=r"--keep left: it holds the images"):
        listed(path, image_column="left", keep=("left",))
    assert {item.column for item in listed(path, image_column="right")} == {"right"}
    assert [item.uri for item in listed(path, uri_column="url")] == [
        each.as_uri() for each in paths
    ]
    pq.write_table(many.select(["both"]), path)
    with pytest.raises(UsageError, match="column both has several images a row"):
        listed(path)


def test_a_run_that_stopped_resumes(pictures, tmp_path):
    paths, expected = pictures
    source = tmp_path / "t.parquet"
    pq.write_table(image_table(paths), source, row_group_size=4)
    embed(tmp_path / "out", source, shard_size=3)
    (tmp_path / "out" / "embeddings" / "part-00001.parquet").unlink()
    assert embed(tmp_path / "out", source, shard_size=3).images == 3
    assert sorted(vectors_of(tmp_path / "out").values()) == expected


def test_the_sheet_shows_images_that_lie_in_rows(pictures, tmp_path):
    paths, _ = pictures
    source = tmp_path / "t.parquet"
    pq.write_table(image_table(paths), source)
    embed(tmp_path / "out", source)
    items = open_dataset(tmp_path / "out").items(["t.parquet#3", "no"])
    assert list(items) == ["t.parquet#3"]
    sheets = [
        contact_sheet(
            [[Tile("query", "it", item_of(str(paths[3]))), Tile("1.0000", name, items.get(name))]]
        )
        for name in ("t.parquet#3", "no")
    ]
    shown = [sheet.crop((176, 8, 336, 168)).tobytes() for sheet in sheets]
    query = sheets[0].crop((8, 8, 168, 168)).tobytes()
    assert shown[0] == query != shown[1]


def test_tables_and_rows_in_a_store(pictures, tmp_path, monkeypatch):
    """A table that counts from its own prefix, and rows of a file that is then replaced."""
    paths, expected = pictures
    with ObjectStore() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        stores.store.cache_clear()
        files = server.files("rows")
        names = [f"{path.parent.name}/{path.name}" for path in paths]
        for name, path in zip(names, paths, strict=True):
            put(files, f"in/{name}", path.read_bytes())
        put(files, "in/t.csv", "\n".join(["path", *names]).encode())
        pq.write_table(image_table(paths), tmp_path / "t.parquet", row_group_size=4)
        put(files, "in/t.parquet", (tmp_path / "t.parquet").read_bytes())
        for name in "t.csv", "t.parquet":
            embed(tmp_path / f"out-{name}", f"s3://rows/in/{name}")
            assert sorted(vectors_of(tmp_path / f"out-{name}").values()) == expected
        items = listed("s3://rows/in/t.parquet")
        assert items[0].etag and items[0].uri == "s3://rows/in/t.parquet"
        pq.write_table(image_table(paths), tmp_path / "t.parquet", row_group_size=3)
        put(files, "in/t.parquet", (tmp_path / "t.parquet").read_bytes())
        assert {each.reason for each in contents_of(items)} == {"bad_container"}
    stores.store.cache_clear()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_in_a_store_that_is_replaced_while_it_is_opened(
    kind, pictures, tmp_path, monkeypatch
):
    """By one of other images, behind the first request for it."""
    paths, asked = pictures[0], []
    with ObjectStore() as server, FaultyProxy(server.endpoint) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        stores.store.cache_clear()
        files = server.files("rows")
        put(files, f"t.{kind}", write(kind, paths, tmp_path).read_bytes())
        items = listed(f"s3://rows/t.{kind}")
        other = write(kind, paths[::-1], tmp_path).read_bytes()

        def replaced(method, path):
            asked.append(method)
            if len(asked) == 2:
                put(files, f"t.{kind}", other)

        proxy.faults = replaced
        found = contents_of(items)
        assert {each.message for each in found} == {cells.CHANGED}
        assert asked == ["HEAD", "GET"]
    stores.store.cache_clear()


def put(files, name, content):
    with files.open_output_stream(name) as stream:
        stream.write(content)
