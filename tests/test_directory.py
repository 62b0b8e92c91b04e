"""Listing and reading directories."""

import errno
import os
import shutil
import socket
import subprocess

import pytest

from resfeat.errors import Failure, ResfeatError, UsageError
from resfeat.sources import directory, gone, item_of, items_of, listing, read
from resfeat.sources.directory import path_of
from resfeat.sources.item import schema_of
from resfeat.sources.rules import may_be_passed_over, printable
from resfeat.spec import SourceOptions


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode(errors="surrogateescape"))
    return folder


def ids(*sources):
    return [item.id for item in listing([str(source) for source in sources])]


def test_the_order_is_fixed_and_nested(tmp_path):
    make(tmp_path, "b/2.jpg", "b/10.jpg", "a.png", "c/d/e.webp", "B.jpg")
    assert ids(tmp_path) == ["B.jpg", "a.png", "b/10.jpg", "b/2.jpg", "c/d/e.webp"]


def test_what_is_no_image_by_its_name_is_passed_over_and_counted(tmp_path):
    make(tmp_path, "1.jpg", "1.json", "2.JSON", ".DS_Store", ".cache/3.jpg", "noname", "odd.xyz")
    make(tmp_path, "out/_resfeat/spec.json", "out/embeddings/part-00000.parquet")
    there = listing([str(tmp_path)])
    assert [item.id for item in there] == ["1.jpg", "noname", "odd.xyz"]
    assert there.skipped == {".json": 2, "hidden": 2, "resfeat output": 1}


def test_whoever_waits_hears_of_a_listing_that_finds_no_image_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "BEAT_SECONDS", 0)
    make(tmp_path, "labels/1.txt", "labels/2.txt", ".DS_Store", "photos/1.jpg", "photos/2.txt")
    tables = list(listing([str(tmp_path)]).tables())
    assert [table["id"].to_pylist() for table in tables] == [[], [], ["photos/1.jpg"]]
    assert {table.schema for table in tables} == {schema_of()}


def test_several_sources_count_from_their_common_parent(tmp_path):
    make(tmp_path, "x/train/1.jpg", "x/val/1.jpg", "x/single.jpg", "x/other.jpg")
    x = tmp_path / "x"
    assert ids(x / "val", x / "train") == ["train/1.jpg", "val/1.jpg"]
    assert ids(x / "single.jpg", x / "train") == ["single.jpg", "train/1.jpg"]
    assert ids(x / "single.jpg") == ["single.jpg"]


def test_sources_that_overlap_or_are_missing_are_refused(tmp_path):
    make(tmp_path, "a/b/1.jpg", "a b/2.jpg")
    with pytest.raises(UsageError, match="lies within"):
        ids(tmp_path / "a", tmp_path / "a b", tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="lies within"):
        ids(tmp_path / "a", tmp_path / "a")
    with pytest.raises(UsageError, match="does not exist"):
        ids(tmp_path / "nowhere")


def test_odd_names_survive(tmp_path):
    names = [b"bad\xff\xfe.jpg", b"new\nline.jpg", b"glob[a]*?.jpg", b"-rf.jpg", b" lead.jpg"]
    names += [
        b"a" * 251 + b".jpg",
        "\u00e9.jpg".encode(),
        "e\u0301.jpg".encode(),
        b"50%20off#1.jpg",
    ]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(name)
    items = list(listing([str(tmp_path)]))
    assert len({item.id for item in items}) == len(names)
    assert r"bad\xff\xfe.jpg" in {item.id for item in items}
    for item in items:
        item.id.encode(), item.uri.encode("ascii")  # both can be stored
        content, size, mtime = read(item)
        assert os.path.basename(os.fsencode(path_of(item.uri))) == content
        assert (size, mtime) == (item.size, item.mtime)


def test_a_name_that_looks_like_an_escaped_one_has_its_own_id(tmp_path):
    names = (b"a\xff.jpg", rb"a\xff.jpg", rb"a\\xff.jpg", b"b\\\xff.jpg", rb"plain\n.jpg")
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    assert len(set(ids(tmp_path))) == len(names)
    assert {r"a\xff.jpg", r"a\\xff.jpg", r"plain\n.jpg"} < set(ids(tmp_path))


def test_files_that_vanish_during_the_listing_are_counted(tmp_path, monkeypatch):
    make(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    monkeypatch.setattr(directory, "TOGETHER", 1)
    monkeypatch.setattr(directory, "TABLE", 1)
    there = listing([str(tmp_path)])
    given = []
    for item in there:
        given.append(item.id)
        (tmp_path / "2.jpg").unlink(missing_ok=True)
    assert given == ["1.jpg", "3.jpg"]
    assert there.skipped == {"vanished while listing": 1}


def test_the_files_of_a_folder_that_vanishes_are_counted_too(tmp_path, monkeypatch):
    make(tmp_path, "a/1.jpg", "a/2.jpg", "a/3.jpg", "b/4.jpg")
    monkeypatch.setattr(directory, "TOGETHER", 1)
    monkeypatch.setattr(directory, "TABLE", 1)
    there = listing([str(tmp_path)])
    given = []
    for item in there:
        given.append(item.id)
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
    assert given == ["a/1.jpg", "b/4.jpg"]
    assert there.skipped == {"vanished while listing": 2}


def test_each_folder_is_read_once_and_each_file_is_looked_at_once(tmp_path, monkeypatch):
    """By the folder's descriptor: a path from the root on takes the system longer."""
    make(tmp_path, "1.jpg", "a/2.jpg", "a/b/3.jpg", "c/4.txt")
    folders, files = [], []
    scandir, status_of = os.scandir, os.stat

    def scan(path):
        folders.append(os.path.relpath(path, tmp_path))
        return scandir(path)

    def look(path, *, dir_fd=None, follow_symlinks=True):
        if str(path).endswith(("jpg", "txt")):
            files.append((path, dir_fd is not None))
        return status_of(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(directory.os, "scandir", scan)
    monkeypatch.setattr(directory.os, "stat", look)
    there = directory.Directories([str(tmp_path)], f"{tmp_path}/", SourceOptions())
    assert [item.id for table in there.tables() for item in items_of(table)] == [
        "1.jpg", "a/2.jpg", "a/b/3.jpg",
    ]  # fmt: skip
    assert folders == [".", "a", "a/b", "c"]
    assert files == [("1.jpg", True), ("2.jpg", True), ("3.jpg", True)]


def test_rows_of_many_folders_are_each_a_files_own(tmp_path):
    """In one table: plain names, those that are quoted or escaped, and folders of no image."""
    names = ["a/1.jpg", "b/2.txt", "b b/3 3.jpg", "c\u00e9/4.jpg", "d/\u00e9.jpg", "d/f.jpg",
             "e\\x/5.jpg", "f/\\x6.jpg", "g/.7.jpg", "h/8%.jpg", "h\udcff/9.jpg"]  # fmt: skip
    make(tmp_path, *names)
    found = list(listing([str(tmp_path)], SourceOptions(label_from="parent")))
    paths = sorted((tmp_path / name for name in names), key=os.fsencode)
    paths = [path for path in paths if path.suffix == ".jpg" and path.name[0] != "."]
    assert [item.uri for item in found] == [item_of(str(path)).uri for path in paths]
    statuses = [path.stat() for path in paths]
    assert [(item.size, item.mtime) for item in found] == [
        (status.st_size, status.st_mtime_ns // 1000) for status in statuses
    ]
    assert [item.id for item in found] == [
        printable(str(path.relative_to(tmp_path))) for path in paths
    ]
    assert [item.label for item in found] == [printable(path.parent.name) for path in paths]


@pytest.mark.parametrize("ending", ["jpg", "JPG", "jpeg", "webp", "tiff", "heif", "avif"])
def test_names_of_images_need_no_second_look(ending):
    """And all others do, wherever in them the ending of an image is."""
    plain = ["no dot", f"1.{ending}", "2.png", f"3.{ending}"]
    assert not may_be_passed_over(plain)
    for other in (f".{ending}", f"4.{ending}.txt", "5.json", "6.json.", ".hidden"):
        assert may_be_passed_over([*plain, other]), other
        assert may_be_passed_over([other, *plain]), other


def test_a_dataset_is_no_source(tmp_path):
    make(tmp_path, "_resfeat/spec.json")
    with pytest.raises(UsageError, match="is a resfeat dataset"):
        ids(tmp_path)


def test_links_are_followed_but_not_for_ever(tmp_path):
    make(tmp_path, "in/1.jpg", "away/2.jpg")
    inside = tmp_path / "in"
    (inside / "loop").symlink_to(".")
    (inside / "linked").symlink_to(tmp_path / "away")
    (inside / "file.jpg").symlink_to(tmp_path / "away" / "2.jpg")
    (inside / "dangling.jpg").symlink_to("nowhere")
    (inside / "self.jpg").symlink_to("self.jpg")
    assert ids(inside) == ["1.jpg", "dangling.jpg", "file.jpg", "linked/2.jpg", "self.jpg"]


def test_a_link_to_a_folder_further_up_is_a_loop(tmp_path):
    make(tmp_path, "a/1.jpg", "a/b/c/2.jpg")
    (tmp_path / "a" / "b" / "c" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "top").symlink_to(tmp_path)
    there = listing([str(tmp_path)])
    assert [item.id for item in there] == ["a/1.jpg", "a/b/c/2.jpg"]
    assert there.skipped == {"link loop": 2}
    within = listing([str(tmp_path / "a" / "b")])  # a link leads out of it, and so back in
    assert [item.id for item in within] == ["c/2.jpg", "c/up/1.jpg"]
    assert within.skipped == {"link loop": 1, "repeated folder": 1}


def test_a_folder_that_several_links_lead_to_is_listed_once(tmp_path):
    """Where the listing first comes to it: each of ten floors has two links to the next."""
    for floor in range(10):
        (tmp_path / f"floor{floor}").mkdir()
        for link in "ab":
            (tmp_path / f"floor{floor}" / link).symlink_to(tmp_path / f"floor{floor + 1}")
    make(tmp_path, "floor10/1.jpg", "zoo/2.jpg")
    (tmp_path / "zoo" / "linked").symlink_to(tmp_path / "floor10")
    there = listing([str(tmp_path)])
    assert [item.id for item in there] == ["floor0/a/a/a/a/a/a/a/a/a/a/1.jpg", "zoo/2.jpg"]
    assert there.skipped == {"repeated folder": 10 + 10 + 1}
    assert ids(tmp_path / "floor9", tmp_path / "floor10") == ["floor10/1.jpg"]  # a source is itself


def test_folders_that_look_the_same_are_all_listed_where_no_link_is(tmp_path, monkeypatch):
    """Inode numbers of some file systems mean nothing."""
    make(tmp_path, "a/1.jpg", "b/2.jpg", "b/c/3.jpg")
    monkeypatch.setattr(directory, "_key", lambda status: 0)
    assert ids(tmp_path) == ["a/1.jpg", "b/2.jpg", "b/c/3.jpg"]


def test_folders_nested_deeper_than_python_recurses(tmp_path):
    here = os.getcwd()
    os.chdir(tmp_path)
    for _ in range(1_100):
        os.mkdir("d")
        os.chdir("d")
    with open("1.jpg", "wb"):
        pass
    os.chdir(here)
    found = ids(tmp_path)
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # or pytest's own clean-up recurses
    assert found == ["d/" * 1_100 + "1.jpg"]


def test_a_listing_leaves_no_descriptor_open(tmp_path):
    make(tmp_path, "a/1.jpg", "a/2.jpg", "b/c/3.jpg", "out/_resfeat")
    before = os.listdir("/proc/self/fd")
    assert len(ids(tmp_path)) == 3
    assert os.listdir("/proc/self/fd") == before
    tables = listing([str(tmp_path)]).tables()
    next(tables)
    tables.close()  # as when a run is stopped
    assert os.listdir("/proc/self/fd") == before


def test_names_in_any_script_are_sorted_by_their_bytes(tmp_path):
    names = [b"z.jpg", "\u00e9.jpg".encode(), "\U0001f600.jpg".encode(), b"\xe0.jpg", b"\xff.jpg",
             "\uffff.jpg".encode(), b"A.jpg", b"a.jpg", b"a b.jpg"]  # fmt: skip
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    listed = [os.fsencode(path_of(item.uri)) for item in listing([str(tmp_path)])]
    assert [os.path.basename(path) for path in listed] == sorted(names)


def test_folders_of_any_length_lie_in_their_order_among_files(tmp_path, monkeypatch):
    """However many entries are looked at together, and where among them a folder is."""
    names = [f"{n:02}.jpg" for n in range(7)] + ["03/a.jpg", "03/b.jpg", "06/c.jpg", "99/d.txt"]
    make(tmp_path, *names)
    expected = sorted(names[:-1], key=os.fsencode)
    for together in (1, 2, 3, 7, 256):
        monkeypatch.setattr(directory, "TOGETHER", together)
        assert ids(tmp_path) == expected


@pytest.mark.parametrize("year", [1902, 1969, 2026, 2300])
def test_a_file_of_any_age(year, tmp_path):
    path = make(tmp_path, "1.jpg") / "1.jpg"
    seconds = (year - 1970) * 31_556_952
    os.utime(path, ns=(0, seconds * 10**9 + 1_999))
    (item,) = listing([str(tmp_path)])
    assert item.mtime == os.stat(path).st_mtime_ns // 1000  # what the file system made of it


def test_a_label_is_the_name_of_the_folder(tmp_path):
    make(tmp_path, "cats/1.jpg", "cats/x/2.jpg", "odd +%/3.jpg", "4.jpg")
    given = {
        item.id: item.label for item in listing([str(tmp_path)], SourceOptions(label_from="parent"))
    }
    assert given == {"cats/1.jpg": "cats", "cats/x/2.jpg": "x", "odd +%/3.jpg": "odd +%",
                     "4.jpg": tmp_path.name}  # fmt: skip


def test_an_image_within_a_file_of_several(tmp_path):
    path = tmp_path / "several.bin"
    path.write_bytes(b"0123456789")
    whole = item_of(str(path))
    part = whole._replace(offset=3, size=4)
    mtime = path.stat().st_mtime_ns // 1000
    assert read(whole) == (b"0123456789", 10, mtime)
    assert read(part) == (b"3456", 4, mtime)
    assert read(part._replace(offset=0)) == (b"0123", 4, mtime)
    assert read(part._replace(offset=7)).reason == "bad_container"
    assert read(part._replace(size=0)).reason == "empty"


def test_special_files_are_listed_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    with open(tmp_path / "giant.jpg", "wb") as file:
        file.truncate(64 << 30)
    reasons = {item.id: read(item).reason for item in listing([str(tmp_path)])}
    assert reasons == {
        "fifo.jpg": "not_regular_file",
        "giant.jpg": "too_large",
        "socket.jpg": "not_regular_file",
    }
    assert read(item_of(str(tmp_path / "folder.jpg"))).reason == "not_regular_file"
    assert read(item_of(str(tmp_path / "gone.jpg"))) == Failure(
        "read", "not_found", "No such file or directory"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    make(tmp_path, "a/1.jpg", "2.jpg")
    (tmp_path / "2.jpg").chmod(0)
    assert read(item_of(str(tmp_path / "2.jpg"))).reason == "permission"
    (tmp_path / "a").chmod(0)
    with pytest.raises(ResfeatError, match="cannot list"):
        ids(tmp_path)
    (tmp_path / "a").chmod(0o755)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_looked_at_is_not_taken_for_one_that_is_gone(
    number, tmp_path, monkeypatch
):
    """As in a folder that may be read and not searched: an update would remove its rows."""
    make(tmp_path, "1.jpg", "a/2.jpg")
    status_of = os.stat

    def look(path, **how):
        if str(path).endswith("2.jpg"):
            raise OSError(number, os.strerror(number))
        return status_of(path, **how)

    monkeypatch.setattr(directory.os, "stat", look)
    monkeypatch.setattr(directory.os, "lstat", look)
    with pytest.raises(ResfeatError, match=r"cannot look at .*/a/2\.jpg: .*; have its folder"):
        ids(tmp_path)


def test_a_source_that_is_gone_is_told_from_a_file_that_is(tmp_path):
    folder, single = tmp_path / "folder", tmp_path / "single.jpg"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"a")
    roots, unread = [str(folder), str(single)], [(folder / "b.jpg").as_uri(), single.as_uri()]
    assert gone(roots, unread) is None  # each was an image that has vanished
    assert gone(roots, unread[:1]) == str(single)
    (folder / "a.jpg").unlink()  # as unmounting it would
    assert gone(roots, unread) == str(folder)
