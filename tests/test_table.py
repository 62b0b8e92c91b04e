"""Tables of addresses: what they mean, and what becomes of a row that means nothing."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from later import Later
from small import embed, embedded_pictures, failures_of, image_table, messages_of, vectors_of
from tables import rows

from resfeat.dataset import Layout
from resfeat.errors import ResfeatError, UsageError
from resfeat.plan import write_plan
from resfeat.run import Run
from resfeat.sources import gone, listing, unique
from resfeat.sources.formats import RowFile
from resfeat.spec import SourceOptions
from resfeat.worker import Job
from resfeat.worker.messages import READ_AHEAD, READ_AHEAD_FAR

pandas = Later("pandas")
polars = Later("polars")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return embedded_pictures(tmp_path_factory.mktemp("pictures"))


def listed(path, **options):
    return list(listing([str(path)], SourceOptions(**options)))


def text_list(folder, *lines):
    path = folder / "list.txt"
    path.write_text("\n".join(lines))
    return path


def save(path: Path, uris: list[str], captions: list[str]) -> Path:
    """A table of two columns, of the kind that its name says, by whoever often writes that."""
    columns = {"uri": uris, "caption": captions}
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table(columns), path, row_group_size=4)
        case ".csv" | ".tsv":
            pandas.DataFrame(columns).to_csv(
                path, index=False, sep="\t" if path.suffix == ".tsv" else ","
            )
        case ".jsonl":
            polars.DataFrame(columns).write_ndjson(path)
        case ".ndjson":
            lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in
                     zip(uris, captions, strict=True)]  # fmt: skip
            path.write_text("\n".join(lines))
        case ".txt":
            path.write_text("# a list\n\n" + "\r\n".join(uris) + "\n")
    return path


KINDS = ["parquet", "csv", "tsv", "jsonl", "ndjson", "txt"]


@pytest.mark.parametrize(
    ("kind", "way"), [*((kind, "relative") for kind in KINDS), ("csv", "absolute"), ("txt", "uri")]
)
def test_a_table_gives_the_bits_of_the_directory(pictures, tmp_path, kind, way):
    paths, expected = pictures
    uris = {
        "absolute": [str(path) for path in paths],
        "relative": [os.path.relpath(path, tmp_path) for path in paths],
        "uri": [path.as_uri() for path in paths],
    }[way]
    captions = [f'a "quoted",\nbroken caption of {n}' for n in range(len(paths))]
    table = save(tmp_path / f"t.{kind}", uris, captions)
    keep = () if kind == "txt" else ("caption",)
    report = embed(tmp_path / "out", table, keep=keep, label_from="parent")
    assert (report.embedded, report.failed) == (len(paths), 0)
    assert sorted(vectors_of(tmp_path / "out").values()) == expected
    told = {row["id"]: row for row in rows(tmp_path / "out").to_pylist()}
    assert sorted(told) == sorted(uris)
    for path, uri, caption in zip(paths, uris, captions, strict=True):
        assert told[uri]["label"] == path.parent.name
        assert not keep or told[uri]["caption"] == caption
    there = listed(table)
    assert [item.uri for item in there] == [
        path.as_uri() if way != "relative" else f"{tmp_path.as_uri()}/{quoted(uri)}"
        for path, uri in zip(paths, uris, strict=True)
    ]
    assert {(item.size, item.mtime) for item in there} == {(None, None)}


def quoted(path):
    return Path("/", path).as_uri().removeprefix("file:///")


def test_what_a_row_means(tmp_path):
    lines = {
        "/a/b.jpg": ("file:///a/b.jpg", None),
        "/a b/ü%.jpg": ("file:///a%20b/%C3%BC%25.jpg", None),
        "x/../y.jpg": (f"file://{tmp_path}/x/../y.jpg", None),
        "file:///a%20b.jpg": ("file:///a%20b.jpg", None),
        "file:///a b.jpg": ("file:///a%20b.jpg", None),
        "file://localhost/a.jpg": ("file:///a.jpg", None),
        "file://server/a.jpg": ("file://server/a.jpg", "not_found"),
        "file:///a%00b.jpg": ("file:///a%00b.jpg", "not_found"),
        "s3://bucket/a b/1%.jpg": ("s3://bucket/a%20b/1%25.jpg", None),
        "s3://bucket/plain.jpg": ("s3://bucket/plain.jpg", None),
        "s3://bucket/a/../b.jpg": ("s3://bucket/a/../b.jpg", "not_found"),
        "s3://bucket//b.jpg": ("s3://bucket//b.jpg", "not_found"),
        "s3://bucket": ("s3://bucket/", "not_found"),
        "http://host:8000/a.jpg?x=1&y=%20": ("http://host:8000/a.jpg?x=1&y=%20", None),
        "https://host/a b.jpg": ("https://host/a%20b.jpg", None),
        "https://user:secret@host/a.jpg": ("https://host/a.jpg", "permission"),
        "ftp://host/a.jpg": ("ftp://host/a.jpg", "io_error"),
        "http://[/a.jpg": ("http://[/a.jpg", "not_found"),
    }
    there = listed(text_list(tmp_path, *lines))
    found = {item.id: (item.uri, item.problem and item.problem.partition(":")[0]) for item in there}
    lines["https://host/a.jpg"] = lines.pop("https://user:secret@host/a.jpg")
    assert found == lines
    assert "ftp:// is not read: give a path" in next(
        item.problem for item in there if item.id.startswith("ftp")
    )


def test_an_image_in_a_data_uri_is_a_failure_that_is_called_by_its_place(tmp_path):
    image = "data:image/png;base64,iVBORw0KGgo="
    there = listed(text_list(tmp_path, image, "DATA:;charset=x,1", "data:1.jpg", f"/{image}"))
    assert [item.id for item in there] == ["list.txt#0", "list.txt#1", "data:1.jpg", f"/{image}"]
    for item in there[:2]:
        assert item.uri == "data:"
        assert item.problem.startswith("io_error: data: is not read: give a path, or one of file:")
    assert [item.problem for item in there[2:]] == [None, None]


def test_a_row_that_means_nothing_is_a_failure_that_keeps_its_columns(pictures, tmp_path):
    paths, _ = pictures
    table = pa.table({
        "path": [str(paths[0]), None, "", "ftp://host/1.jpg", "gone.jpg", "nul\0.jpg"],
        "meta": [{"n": n, "tags": [str(n)]} for n in range(6)],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    report = embed(tmp_path / "out", tmp_path / "t.parquet", keep=("meta",))
    assert (report.embedded, report.failed) == (1, 5)
    assert failures_of(tmp_path / "out") == {
        "t.parquet#1": "not_found", "t.parquet#2": "not_found", "ftp://host/1.jpg": "io_error",
        "gone.jpg": "not_found", "nul\0.jpg": "not_found",
    }  # fmt: skip
    failed = rows(tmp_path / "out", "failures")
    assert failed.schema.field("meta").type == table.schema.field("meta").type
    assert {row["id"]: row["meta"]["n"] for row in failed.to_pylist()}["gone.jpg"] == 4
    assert rows(tmp_path / "out")["meta"].to_pylist() == [{"n": 0, "tags": ["0"]}]


def test_the_id_column_may_have_any_type_and_gaps(pictures, tmp_path):
    paths, expected = pictures
    numbers = [7, None, *range(100, 98 + len(paths))]
    pq.write_table(
        pa.table({"n": numbers, "file_name": [str(path) for path in paths]}), tmp_path / "t.parquet"
    )
    embed(tmp_path / "out", tmp_path / "t.parquet", id_column="n")
    there = vectors_of(tmp_path / "out")
    assert {"7", "t.parquet#1", "100"} <= set(there)
    assert sorted(there.values()) == expected


def test_two_items_with_one_id_are_one_image_and_failures(pictures, tmp_path):
    """In one table and across tables, and where the name that a failure gets is taken."""
    paths, _ = pictures
    one, two = (str(path) for path in paths[:2])
    ids = {"1.csv": ["a", "b", "a;2", "a"], "2.csv": ["a", "c"]}
    for name, some in ids.items():
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([["id", "path"], *((each, one) for each in some)])
    images = pa.table({"id": ["d", "b"], "image": [Path(two).read_bytes()] * 2})
    pq.write_table(images, tmp_path / "3.parquet")
    sources = [tmp_path / "1.csv", tmp_path / "2.csv", tmp_path / "3.parquet"]
    report = embed(tmp_path / "out", *sources, id_column="id")
    assert (report.embedded, report.failed) == (5, 3)
    assert set(vectors_of(tmp_path / "out")) == {"a", "b", "a;2", "c", "d"}
    assert failures_of(tmp_path / "out") == dict.fromkeys(["a;3", "a;4", "b;2"], "duplicate_id")
    assert messages_of(tmp_path / "out")["a;4"] == "a was listed before"


def test_an_id_that_a_folder_has_as_well(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").touch()
    table = save(tmp_path / "t.csv", ["/a.jpg", "/b.jpg"], ["in/1.jpg", "x"])
    options = SourceOptions(id_column="caption")
    there = list(listing([str(tmp_path / "in"), str(table)], options))
    assert [item.id for item in there] == ["in/1.jpg", "in/1.jpg;2", "x"]
    assert [item.problem and item.problem.partition(":")[0] for item in there] == [
        None, "duplicate_id", None
    ]  # fmt: skip


def test_an_address_may_look_like_the_place_of_a_row(pictures, tmp_path):
    pq.write_table(image_table(pictures[0]), tmp_path / "b.parquet")
    table = text_list(tmp_path, "b.parquet#3")
    there = list(listing([str(table), str(tmp_path / "b.parquet")]))
    assert {item.id for item in there} == {
        *(f"b.parquet#{n}" for n in range(len(pictures[0]))), "b.parquet#3;2"
    }  # fmt: skip


def test_beside_other_sources_a_table_is_read_twice_like_alone(tmp_path, monkeypatch):
    """Once for the ids, and once for the items."""
    begun, batches = [], RowFile.batches
    monkeypatch.setattr(RowFile, "batches", lambda *given: begun.append(given) or batches(*given))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").touch()
    table = text_list(tmp_path, "/a.jpg")
    assert len(list(listing([str(table)]))) == 1 and len(begun) == 2
    begun.clear()
    assert len(list(listing([str(table), str(tmp_path / "in")]))) == 2 and len(begun) == 2


def test_a_table_that_is_written_while_it_is_listed_is_refused(tmp_path):
    """Its ids were looked at before: two of them might be one now."""
    table = text_list(tmp_path, "/a.jpg", "/b.jpg")
    tables = listing([str(table)]).tables()
    assert next(tables).num_rows == 0  # of the first look
    with open(table, "a") as file:
        file.write("\n/a.jpg\n")
    with pytest.raises(ResfeatError, match=r"list\.txt was changed while it was listed: give"):
        list(tables)


def test_the_first_look_at_a_long_table_may_be_stopped(tmp_path):
    path, seen = text_list(tmp_path, *(f"/{n:07}.jpg" for n in range(300_000))), []
    for table in listing([str(path)]).tables():
        seen.append(table.num_rows)
    assert seen.count(0) > 4 and seen == sorted(seen, key=bool)


def test_bytes_are_no_text(tmp_path):
    pq.write_table(pa.table({"key": [b"\xff"], "path": ["/a.jpg"]}), tmp_path / "t.parquet")
    for options in ({"id_column": "key", "uri_column": "path"}, {"uri_column": "key"}):
        with pytest.raises(UsageError, match=r"-column key: in .* it is binary: give a column"):
            listed(tmp_path / "t.parquet", **options)


def test_a_table_of_addresses_may_go_once_it_is_listed(tmp_path):
    table = text_list(tmp_path, "/a.jpg")
    table.unlink()
    assert gone([str(table)], ["file:///a.jpg"]) is None


def test_what_nobody_has_cannot_be_kept(tmp_path):
    (tmp_path / "1.jpg").touch()
    with pytest.raises(UsageError, match=r"^--keep nope: only tables and tars"):
        listed(tmp_path, keep=("nope",))


def test_what_cannot_be_kept_is_refused_before_anything_is_written(pictures, tmp_path):
    table = text_list(tmp_path, *map(str, pictures[0]))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"--keep nope: table .* has no such column"):
            embed(tmp_path / "out", table, keep=("nope",))
        assert not (tmp_path / "out").exists()


def test_hashes_that_are_alike_only_cost_a_second_look(monkeypatch):
    monkeypatch.setattr(unique, "_hashes", lambda ids: np.zeros(len(ids), np.int64))
    names = pa.array(["a", "b", "c"])
    table = pa.table({"id": names, "problem": pa.nulls(3, pa.string())})
    *_, resolved = unique.resolved([names], [table])
    assert resolved == table


def test_which_column_has_the_addresses(tmp_path):
    def columns(names, **options):
        path = tmp_path / "t.csv"
        path.write_text(f"{','.join(names)}\n{','.join(names)}\n")
        return [item.id for item in listed(path, **options)]

    assert columns(["caption", "URL"]) == ["URL"]
    assert columns(["whatever"]) == ["whatever"]
    assert columns(["url", "path"], uri_column="path") == ["path"]
    coded = pa.table({"n": [1], "some": pa.array(["/a.jpg"]).dictionary_encode()})
    pq.write_table(coded, tmp_path / "t.parquet")
    assert [item.id for item in listed(tmp_path / "t.parquet")] == ["/a.jpg"]
    with pytest.raises(UsageError, match=r"t\.csv .*Give --uri-column: it has url, path$"):
        columns(["url", "path"])
    with pytest.raises(UsageError, match=r"--uri-column url: .*t\.csv has several columns called"):
        columns(["url", "url"], uri_column="url")
    with pytest.raises(UsageError, match=r"which column .* it has a, b$"):
        columns(["a", "b"])
    for option in "uri_column", "id_column":
        with pytest.raises(
            UsageError, match=rf"--{option[:2]}.*t\.csv has no such .* it has a, b$"
        ):
            columns(["a", "b"], **{option: "c"})
    with pytest.raises(UsageError, match=r"--keep c: table .*t\.csv has no such column"):
        columns(["url", "b"], keep=("b", "c"))


def test_a_table_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "ragged.csv").write_text("uri,n\n/a.jpg,1\n/b.jpg\n")
    (tmp_path / "late.jsonl").write_text('{"uri": "/a.jpg", "n": 1}\n' + '{"uri": 5, "n": 1}\n')
    (tmp_path / "latin.txt").write_bytes(b"/caf\xe9.jpg\n")
    (tmp_path / "no.parquet").write_bytes(b"no parquet")
    (tmp_path / "empty.csv").write_bytes(b"")
    for name in "ragged.csv", "late.jsonl", "latin.txt", "no.parquet", "empty.csv":
        with pytest.raises(
            ResfeatError, match=rf"table .*{name} cannot be read \(.*\): mend"
        ) as it:
            listed(tmp_path / name)
        assert "\n" not in str(it.value)


def test_kept_columns_of_two_types_are_refused(tmp_path):
    for name, values in ("1.parquet", [1]), ("2.parquet", ["one"]):
        pq.write_table(pa.table({"uri": ["/a.jpg"], "n": values}), tmp_path / name)
    with pytest.raises(UsageError, match=r"--keep n: it is int64 in .*1\.parquet and string in"):
        list(listing([str(tmp_path / "*.parquet")], SourceOptions(keep=("n",))))


def test_json_has_the_types_of_its_first_rows(tmp_path):
    """A text that looks like a time there stays one, and what is null there is text later."""
    many = [{"uri": f"/{n}.jpg", "when": "2020-01-01", "who": None, "n": n} for n in range(100_000)]
    many += [{"uri": "/z.jpg", "when": "last year", "who": "me", "n": 1, "new": 1}]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, many)))
    there = listed(path, keep=("when", "who", "n"))
    assert there[0].carried == ("2020-01-01", None, 0)
    assert there[-1].carried == ("last year", "me", 1)
    assert len(there) == 100_001


def test_long_tables_are_listed_piece_by_piece(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(f"/images/{n:07}.jpg\n" for n in range(300_000)))
    tables = list(listing([str(path)]).tables())
    assert max(table.num_rows for table in tables) <= 65536 and len(tables) > 4
    assert sum(table.num_rows for table in tables) == 300_000


def test_more_is_read_ahead_where_images_lie_far(tmp_path):
    """Also if only the second file of the plan lists such."""
    near = [f"/{n}.jpg" for n in range(64)]
    for name, line, ahead in (
        ("near", "/a.jpg", READ_AHEAD),
        ("far", "http://host/a.jpg", READ_AHEAD_FAR),
    ):
        layout = Layout(tmp_path / name)
        layout.plan.mkdir(parents=True)
        there = listing([str(text_list(tmp_path, *near, line))])
        plan = write_plan(layout.plan, tmp_path, there.tables(), 1)
        assert len(plan.files) == 2
        options = SimpleNamespace(label_from=None)
        about = {"sources": (), "source_options": options, "identity": None, "quantised": None}
        record = SimpleNamespace(plan=plan, created="", **about)
        assert Job.of(layout, record, {}).reads_ahead == ahead


@pytest.mark.parametrize("change", ["removed", "no table", "other columns"])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "*.parquet"])
def test_a_resume_does_without_the_table(pictures, tmp_path, name, change):
    paths, expected = pictures
    table = save(tmp_path / name.replace("*", "t"), list(map(str, paths)), ["" for _ in paths])
    source, output = tmp_path / name, tmp_path / "out"
    embed(output, source, shard_size=3, keep=("caption",))
    (output / "embeddings" / "part-00001.parquet").unlink()
    match change:
        case "removed":
            table.unlink()
        case "no table":
            table.write_text("")
        case "other columns":
            table = save(table.with_suffix(".jsonl"), ["/x"], ["y"]).rename(table)
    assert embed(output, source, shard_size=3, keep=("caption",)).images == 3
    assert sorted(vectors_of(output).values()) == expected
    assert rows(output)["caption"].to_pylist() == ["" for _ in paths]
    with pytest.raises(UsageError, match="source"):
        embed(output, tmp_path / "gone", shard_size=3, keep=("caption",))
    with pytest.raises(UsageError, match="made with another keep"):
        embed(output, source, shard_size=3)


def test_a_listing_that_nobody_began_on_stays_where_the_next_command_is_wrong(
    pictures, tmp_path, monkeypatch
):
    """And with other choices it is taken over, without the table."""
    table, output = text_list(tmp_path, *map(str, pictures[0])), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Run, "tasks", no_worker)
        with pytest.raises(ResfeatError, match="could not start"):
            embed(output, table)
    with pytest.raises(UsageError, match="--keep nope"):
        embed(output, table, keep=("nope",))
    table.unlink()
    assert embed(output, table, normalize=True).images == len(pictures[0])


def no_worker(run, parity):
    raise ResfeatError("could not start")


def test_a_run_that_stopped_resumes_without_reading_what_is_committed(pictures, tmp_path):
    paths, expected = pictures
    table = save(tmp_path / "t.csv", [str(path) for path in paths], ["" for _ in paths])
    embed(tmp_path / "out", table, shard_size=3)
    part = tmp_path / "out" / "embeddings" / "part-00001.parquet"
    before = {path.name: path.stat().st_mtime_ns for path in part.parent.iterdir()}
    part.unlink()
    table.write_text("uri,caption\n")  # the plan is frozen
    report = embed(tmp_path / "out", table, shard_size=3)
    assert report.images == 3
    assert sorted(vectors_of(tmp_path / "out").values()) == expected
    after = {path.name: path.stat().st_mtime_ns for path in part.parent.iterdir()}
    assert [name for name in before if before[name] != after[name]] == [part.name]
