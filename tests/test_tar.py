"""Tars as sources: what their members are called, how they are read, and what damage does."""

from __future__ import annotations

import errno
import gzip
import io
import os
import random
import subprocess
import tarfile
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
from object_store import FaultyProxy, ObjectStore
from PIL import Image

from resfeat import ExtractSpec, RuntimeOptions, extract, open_dataset
from resfeat.errors import Failure, Stopped, UsageError
from resfeat.sources import (
    ahead,
    gone,
    listing,
    prefix,
    read,
    read_ahead,
    reading,
    runs,
    stays_whole,
    tar,
)
from resfeat.sources.ahead import Ahead
from resfeat.sources.headers import Damage, headers
from resfeat.sources.windowed import IN_STORE, Windowed, opened
from resfeat.spec import SourceOptions
from resfeat.storage import remote

LONG = "a long folder " * 5 + "/" + "and a long name " * 5 + ".png"  # > 100 bytes, ustar can split


@pytest.fixture(scope="module")
def pictures():
    """Small pictures by name, in folders."""
    made = {}
    for number in range(7):
        content = io.BytesIO()
        Image.effect_noise((40, 30), 20 + 9 * number).convert("RGB").save(content, "PNG")
        made[f"{'cat' if number % 2 else 'dog'}/{number}.png"] = content.getvalue()
    return made | {LONG: made["dog/0.png"]}


def pack(path, members, **options):
    """Write a tar of (name, bytes), in this order."""
    mode = "w:gz" if str(path).lower().endswith("gz") else "w"
    with tarfile.open(path, mode, **options) as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def unpack(folder, members):
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def items(*sources, **options):
    return list(listing([str(source) for source in sources], SourceOptions(**options)))


def lengths_fetched(monkeypatch):
    """A list that gets the length of each piece that is fetched of a tar in a store."""
    lengths, real = [], prefix.fetch

    def counted(*place, **options):
        found = real(*place, **options)
        lengths.append(len(found.data))
        return found

    monkeypatch.setattr(prefix, "fetch", counted)
    return lengths


def contents(some):
    """What the items hold, read in runs as a worker does."""
    found = {}
    for run in runs(some, range(len(some)), 32):
        for place, content in zip(run.places, run.read(), strict=True):
            failed = isinstance(content, Failure)
            found[some[place].id] = content.reason if failed else content[0]
    return found


def embed(sources, output, **options):
    spec = ExtractSpec(
        sources=tuple(map(str, sources)),
        output=str(output),
        model="cifar_resnet20",
        weights="random:0",
        runtime=RuntimeOptions(workers=0, runtime="torch"),
        max_error_rate=1,
        **options,
    )
    extract(spec)
    return open_dataset(output)


def test_every_kind_of_tar_gives_what_the_directory_gives(pictures, tmp_path):
    folder = unpack(tmp_path / "photos", pictures)
    for name, form in {"1.tar": tarfile.USTAR_FORMAT, "2.tar": tarfile.PAX_FORMAT,
                       "3.tar.gz": tarfile.GNU_FORMAT}.items():  # fmt: skip
        pack(tmp_path / name, pictures, format=form)
    for form, name in {"ustar": "4.tar", "posix": "5.tgz", "gnu": "6.tar"}.items():
        how = ["-caf", tmp_path / name, f"--format={form}", "-C", folder, "."]
        subprocess.run(["tar", *how], check=True)
    tars = [entry for entry in tmp_path.iterdir() if entry.is_file()]
    table = embed([folder, *tars], tmp_path / "out").embeddings.to_table()
    found = {row["id"]: row["embedding"] for row in table.to_pylist()}
    assert len(found) == 7 * len(pictures)
    for name in pictures:
        loose = found[f"photos/{name}"]
        assert [found[f"{number}.tar#{name}"] for number in (1, 2)] == [loose] * 2
        assert found[f"3.tar.gz#{name}"] == loose
        packed = "4.tar", "5.tgz", "6.tar"
        assert [found[f"{each}#./{name}"] for each in packed] == [loose] * 3


@pytest.fixture
def read_by(monkeypatch):
    """Counts what is read: (start, length) of each read of a file by its place."""
    reads, pread = [], os.pread

    def counted(descriptor, length, start):
        data = pread(descriptor, length, start)
        reads.append((start, len(data)))
        return data

    monkeypatch.setattr(os, "pread", counted)
    return reads


def test_ids_places_and_versions(pictures, tmp_path):
    path = pack(tmp_path / "a 1.tar", pictures)
    found = items(path)
    assert [item.id for item in found] == [f"a 1.tar#{name}" for name in pictures]
    data = path.read_bytes()
    for item, content in zip(found, pictures.values(), strict=True):
        assert item.uri == f"file://{tmp_path}/a%201.tar"
        assert data[item.offset : item.offset + item.size] == content
        assert item.mtime == path.stat().st_mtime_ns // 1000
        assert read(item) == (content, len(content), item.mtime)


def test_names_are_ids_and_touch_nothing(tmp_path):
    odd = {"../../x": b"1", "/etc/passwd": b"2", "b\udcff.jpg": b"3", "a\nb.jpg": b"4"}
    path = pack(tmp_path / "a.tar", odd)
    assert [item.id for item in items(path)] == [
        "a.tar#../../x", "a.tar#/etc/passwd", "a.tar#b\\xff.jpg", "a.tar#a\nb.jpg",
    ]  # fmt: skip
    assert list(contents(items(path)).values()) == [b"1", b"2", b"3", b"4"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


def test_a_name_that_comes_again_is_told_apart(tmp_path):
    names = ["x.jpg", "x.jpg;2", "x.jpg", "x.jpg", "x.jpg;2", "y.jpg"]
    path = pack(tmp_path / "a.tar", [(name, str(n).encode()) for n, name in enumerate(names)])
    found = contents(items(path))
    assert list(found) == [
        f"a.tar#{name}" for name in
        ("x.jpg", "x.jpg;2", "x.jpg;3", "x.jpg;4", "x.jpg;2;2", "y.jpg")
    ]  # fmt: skip
    assert list(found.values()) == [str(n).encode() for n in range(6)]


def test_hidden_members_and_sidecars_are_counted_and_folders_are_not(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name in ("./a.jpg", "._a.jpg", ".git/b.jpg", "b.json", "c.cls", "sub/.d.jpg"):
            file.addfile(tarfile.TarInfo(name))
        for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            other = tarfile.TarInfo("other.jpg")
            other.type = kind
            file.addfile(other)
    there = listing([str(path)])
    assert [item.id for item in there] == ["a.tar#./a.jpg"]
    assert there.skipped == Counter({"hidden": 3, ".json": 1, ".cls": 1})


def test_a_label_is_the_folder_in_the_tar(tmp_path):
    path = pack(tmp_path / "a.tar", {"cat/1.jpg": b"1", "2.jpg": b"2", "./3.jpg": b"3"})
    assert [item.label for item in items(path, label_from="parent")] == ["cat", None, None]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_what_travels_beside_an_image_is_kept(name, tmp_path):
    path = pack(
        tmp_path / name,
        [("d/1.txt", "früh".encode()), ("d/1.jpg", b"1"), ("2.jpg", b"2"), ("d/1.CLS", b"7\n"),
         ("2.seg.png", b"3"), ("1.jpg", b"4"), ("2.cls", b"\xff"), ("2.txt", b"a"),
         ("1.txt", b"x" * (1024**2 + 1)), ("2.txt", b"b"), ("2.json", b"{}")],
    )  # fmt: skip
    there = listing([str(path)], SourceOptions(keep=("cls", "txt", "caption")))
    assert [field.name for field in there.carried] == ["cls", "txt", "caption"]
    assert [(item.id.partition("#")[2], item.carried) for item in there] == [
        ("d/1.jpg", ("7\n", "früh", None)),
        ("2.jpg", (None, "b", None)),
        ("2.seg.png", (None, "b", None)),
        ("1.jpg", (None, None, None)),
    ]
    assert there.skipped == Counter({".json": 1})
    assert list(contents(items(path, keep=("txt",))).values()) == [b"1", b"2", b"3", b"4"]


def test_kept_columns_are_stored_beside_embeddings_and_failures(pictures, tmp_path):
    beside = {"1.cls": b"5", "1.png": pictures["cat/1.png"], "2.png": b"no image", "2.cls": b"6"}
    dataset = embed([pack(tmp_path / "a.tar", beside)], tmp_path / "out", keep=("cls",))
    assert dataset.embeddings.to_table(["id", "cls"]).to_pylist() == [
        {"id": "a.tar#1.png", "cls": "5"}
    ]
    (failed,) = dataset.failures.to_table().to_pylist()
    assert (failed["id"], failed["cls"]) == ("a.tar#2.png", "6")


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_links_and_sparse_members_fail_alone(form, tmp_path):
    folder = unpack(tmp_path / "photos", {"0.png": b"0" * 700, "z.png": b"z" * 700})
    os.link(folder / "0.png", folder / "1hard.png")
    (folder / "2soft.png").symlink_to("0.png")
    with open(folder / "3sparse.png", "wb") as file:
        file.seek(1_000_000)
        file.write(b"end")
    names = sorted(entry.name for entry in folder.iterdir())
    path = tmp_path / "a.tar"
    how = ["-cf", path, "--sparse", f"--format={form}", "-C", folder, *names]
    subprocess.run(["tar", *how], check=True)
    told = {item.id: item.problem for item in items(path)}
    assert told == {
        "a.tar#0.png": None,
        "a.tar#1hard.png": "bad_container: a hard link to 0.png: links are not followed",
        "a.tar#2soft.png": "bad_container: a symbolic link to 0.png: links are not followed",
        "a.tar#3sparse.png":
            "bad_container: it is stored sparse: write the tar again without --sparse",
        "a.tar#z.png": None,
    }  # fmt: skip
    assert list(contents(items(path)).values()) == [
        b"0" * 700, "bad_container", "bad_container", "bad_container", b"z" * 700,
    ]  # fmt: skip


def whole_and_told(path):
    """The images that can be read, and what is told of the others."""
    some = items(path)
    good = [item.id for item in some if isinstance(contents(some)[item.id], bytes)]
    return good, {item.id: item.problem for item in some if item.problem}


CUT = "bad_container: the tar ends within it, or is damaged there"
NO_END = "bad_container: the tar has no end mark: it seems to be cut short"


@pytest.mark.parametrize(
    ("length", "whole", "told"),
    [
        (0, "abc", {}),  # not cut
        (3 * 1536 - 1, "abc", {"t.tar": NO_END}),  # only padding is missing
        (2 * 1536 + 512 + 700, "abc", {"t.tar": NO_END}),
        (2 * 1536 + 512 + 699, "ab", {"t.tar#c": CUT}),
        (2 * 1536 + 512, "ab", {"t.tar#c": CUT}),
        (2 * 1536 + 511, "ab", {"t.tar": NO_END}),
        (2 * 1536, "ab", {"t.tar": NO_END}),
        (100, "", {"t.tar": "bad_container: it is no tar"}),
        (0, "", {"t.tar": "bad_container: it is empty, and no tar"}),
    ],
)
def test_of_a_tar_cut_short_what_is_whole_is_listed(length, whole, told, tmp_path):
    path = pack(tmp_path / "t.tar", {name: name.encode() * 700 for name in "abc"})
    if told:
        os.truncate(path, length)
    good, found = whole_and_told(path)
    assert (good, found) == ([f"t.tar#{name}" for name in whole], told)


def test_past_a_damaged_header_the_rest_is_listed(tmp_path):
    path = pack(tmp_path / "t.tar", {name: name.encode() * 700 for name in "abcd"})
    damage = bytearray(path.read_bytes())
    damage[1536 + 10] ^= 1  # in the name of b
    path.write_bytes(damage)
    told = {"t.tar": "bad_container: the tar is damaged at byte 1,536"}
    assert whole_and_told(path) == (["t.tar#a", "t.tar#c", "t.tar#d"], told)
    damage[3 * 1536 + 10] ^= 1
    path.write_bytes(damage)
    told["t.tar;2"] = "bad_container: the tar is damaged at byte 4,608"
    assert whole_and_told(path) == (["t.tar#a", "t.tar#c"], told)


@pytest.mark.parametrize(
    "header",
    [
        {"type": tarfile.GNUTYPE_LONGNAME, "size": 2**33},  # would be read into memory
        {"type": tarfile.XHDTYPE, "size": 2**33},
        {"type": tarfile.REGTYPE, "size": -5000},  # leads back, for ever
    ],
)
def test_a_header_that_lies_is_damage(header, tmp_path):
    liar = tarfile.TarInfo("liar")
    for name, value in header.items():
        setattr(liar, name, value)
    path = pack(tmp_path / "t.tar", {"a": b"a" * 700})
    good = path.read_bytes()
    path.write_bytes(good[:1536] + liar.tobuf(tarfile.GNU_FORMAT) + good)
    told = {"t.tar": "bad_container: the tar is damaged at byte 1,536"}
    assert whole_and_told(path) == (["t.tar#a", "t.tar#a;2"], told)


def test_a_file_that_is_no_tar_or_cannot_be_read_is_one_failure(tmp_path):
    (tmp_path / "1.tar").write_bytes(random.Random(0).randbytes(10_000))
    (tmp_path / "2.tar.gz").write_bytes(b"not compressed")
    os.mkfifo(tmp_path / "3.tar")
    found = items(*sorted(tmp_path.iterdir()))
    assert {item.id: item.problem.partition(":")[0] for item in found} == {
        "1.tar": "bad_container", "2.tar.gz": "bad_container", "3.tar": "not_regular_file",
    }  # fmt: skip


def noise(count, size):
    rng = random.Random(0)
    return {f"{number}.jpg": rng.randbytes(size) for number in range(count)}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compressed_tar_is_good_up_to_where_it_is_damaged(when, tmp_path):
    path = pack(tmp_path / "t.tar.gz", noise(10, 100_000))
    good = items(path)
    before = path.stat()
    os.truncate(path, before.st_size // 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    some = good if when == "after" else items(path)
    found = contents(some)
    kinds = ["good" if isinstance(each, bytes) else each for each in found.values()]
    whole = kinds.count("good")
    assert 3 <= whole <= 5
    assert kinds == ["good"] * whole + ["bad_container"] * (10 - whole if when == "after" else 1)


def test_a_wrong_checksum_of_a_compressed_tar_is_one_failure(tmp_path):
    path = pack(tmp_path / "t.tar.gz", noise(3, 1000))
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    good, told = whole_and_told(path)
    assert len(good) == 3 and list(told) == ["t.tar.gz"]
    assert "checksum" in told["t.tar.gz"]


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz"])
@pytest.mark.parametrize("change", ["cut", "replaced", "grown", "gone"])
def test_a_tar_that_changed_since_gives_failures_and_no_other_images(name, change, tmp_path):
    path = pack(tmp_path / name, noise(5, 1000))
    some = items(path)
    path.unlink()
    if change != "gone":
        pack(path, noise(6 if change == "grown" else 5, 1000 if change == "cut" else 1001))
    if change == "cut":
        os.truncate(path, path.stat().st_size - 3000)
    reason = "not_found" if change == "gone" else "bad_container"
    assert list(contents(some).values()) == [reason] * 5
    assert [read(item).reason for item in some] == [reason] * 5


def test_a_run_of_members_is_opened_once_and_nothing_but_images_is_read(
    tmp_path, read_by, monkeypatch
):
    path = pack(tmp_path / "t.tar", noise(50, 3000))
    some = items(path)
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *call: opened.append(call) or real(*call))
    read_by.clear()
    assert list(contents(some).values()) == list(noise(50, 3000).values())
    assert len(opened) == 2  # 50 are two runs
    assert read_by == [(item.offset, 3000) for item in some]


def test_a_window_is_of_so_many_images_and_bytes_and_has_no_wide_gaps(tmp_path):
    def windows(*sizes):
        members = {}
        for number, size in enumerate(sizes):
            kind = "jpg" if size > 0 else "txt"
            members[f"{number}.{kind}"] = bytes(abs(size))
        some = items(pack(tmp_path / "t.tar", members))
        return [len(run.items) for run in runs(some, range(len(some)), 100)]

    assert windows(*[1000] * 70) == [32, 32, 6]
    assert windows(*[3 * 1024**2] * 5) == [2, 2, 1]
    assert windows(1, 20 * 1024**2, 1, 1) == [1, 1, 2]
    assert windows(1, -reading.GAP + 2048, 1, -reading.GAP, 1) == [2, 1]


def test_the_listing_reads_no_images(tmp_path, read_by):
    path = pack(tmp_path / "t.tar", noise(20, 200_000))
    assert len(items(path)) == 20
    assert sum(length for _, length in read_by) <= 23 * 4096


def test_a_compressed_tar_is_one_shard_and_is_read_once(tmp_path, read_by):
    path = pack(tmp_path / "t.tgz", noise(100, 1000))
    (table,) = listing([str(path)]).tables()

    assert stays_whole(table)
    some = items(path)
    read_by.clear()
    assert list(contents(some).values()) == list(noise(100, 1000).values())
    assert sum(length for _, length in read_by) == path.stat().st_size


def test_no_more_of_a_compressed_tar_is_read_than_may_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_WAITING", 40_000)
    monkeypatch.setattr(reading, "WAIT_SECONDS", 60)
    some = items(pack(tmp_path / "t.tgz", noise(128, 1000)))
    coming, third = runs(some, range(128), 32), Event()
    first, _ = next(coming), next(coming)

    def go_on():
        next(coming)
        third.set()

    feeder = Thread(target=go_on)
    feeder.start()
    assert not third.wait(0.5)
    assert len(first.read()) == 32
    assert third.wait(20)
    feeder.join()


def test_a_sample_is_read_from_tars_of_both_kinds(tmp_path):
    some = items(*(pack(tmp_path / name, noise(9, 1000)) for name in ("1.tar", "2.tar.gz")))
    random.Random(1).shuffle(some)
    expected = noise(9, 1000)
    assert [content[0] for content in read_ahead(some, 5)] == [
        expected[item.id.partition("#")[2]] for item in some
    ]


def test_resuming_reads_no_shard_again_that_is_committed(pictures, tmp_path, read_by):
    more = {f"{number}/{name}": each for number in range(4) for name, each in pictures.items()}
    path = pack(tmp_path / "t.tar", more)
    whole = embed([path], tmp_path / "out", shard_size=16).embeddings.to_table()
    parts = sorted((tmp_path / "out" / "embeddings").iterdir())
    assert len(parts) == 2
    parts[1].unlink()
    last = items(path)[16:]
    read_by.clear()
    again = embed([path], tmp_path / "out", shard_size=16).embeddings.to_table()
    assert again.equals(whole)
    of_tar = [start for start, length in read_by if length > 1]
    assert of_tar and min(of_tar) >= last[0].offset


def test_a_careful_decoder_reads_members_too(pictures, tmp_path):
    from resfeat.backbones.ours import IMAGENET
    from resfeat.decoding import CarefulDecoder, loaded

    some = items(pack(tmp_path / "t.tar", pictures))
    with CarefulDecoder(1) as decoder:
        for item, content in zip(some, pictures.values(), strict=True):
            size = loaded(read(item), IMAGENET, "turbo", decoder.decode).size
            assert size == len(content)


def test_many_tars_come_in_their_order_however_many_are_listed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "TARS_AHEAD", 3)
    monkeypatch.setattr(tar, "TABLE", 4)
    for number in range(8):
        pack(tmp_path / f"{number}.tar", {f"{n}.jpg": b"x" for n in range(10)} | {"a.txt": b""})
    there = listing([str(tmp_path)])
    expected = [f"{number}.tar#{n}.jpg" for number in range(8) for n in range(10)]
    assert [item.id for item in there] == expected
    assert [item.id for item in there] == expected
    assert there.skipped == Counter({".txt": 8})
    assert max(table.num_rows for table in there.tables()) == 4


def test_a_long_listing_is_stopped_and_shown_meanwhile(tmp_path):
    """Of a tar that takes seconds to decompress: zeros, and all of them one member. The seconds
    are this process's own, whatever runs beside it."""
    zeros, count = 64 * 1024**2, 64
    member = tarfile.TarInfo("1.png")
    member.size = zeros * count
    piece = gzip.compress(bytes(zeros))
    path = tmp_path / "t.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf()) + piece * count + gzip.compress(bytes(1024)))
    shown = []
    spec = ExtractSpec(
        sources=(str(path),), output=str(tmp_path / "out"), model="cifar_resnet20",
        weights="random:0", runtime=RuntimeOptions(workers=0),
    )  # fmt: skip
    with pytest.raises(Stopped, match="stopped while listing"):
        extract(
            spec,
            on_progress=lambda progress: shown.append((progress.doing, time.process_time())),
            stopping=lambda: len(shown) > 1,
        )
    (doing, first), (_, second) = shown
    assert doing == "listing" and second - first < 5
    assert time.process_time() - second < 2 and not (tmp_path / "out").exists()


def test_looking_for_the_next_header_of_a_damaged_tar_lets_others_look_around(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(pack(path, {"1.png": b"1"}).read_bytes()[:1024] + b"?" * 10**6)
    with opened(path.as_uri()) as file:
        found = list(headers(file.file))
    assert found[0].name == "1.png" and found[1].place == 1024 and found.count(None) > 10


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as server:
        yield server


@pytest.fixture
def bucket(server, monkeypatch):
    """A proxy before a store, and how to put a file there."""
    with FaultyProxy(server.endpoint) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        remote.store.cache_clear()
        name = f"bucket-{uuid.uuid4().hex}"
        files = server.system(allow_bucket_creation=True)
        files.create_dir(name)

        def put(path):
            with files.open_output_stream(f"{name}/shards/{path.name}") as file:
                file.write(path.read_bytes())
            proxy.requests.clear()
            return f"s3://{name}/shards/{path.name}"

        yield proxy, put


@pytest.mark.parametrize("name", ["a 1.tar", "a.tgz"])
def test_a_tar_in_a_store_is_as_on_a_disk(name, pictures, bucket, tmp_path):
    _, put = bucket
    path = pack(tmp_path / name, pictures | {"0.json": b"{}"})
    address = put(path)
    there, here = items(address, keep=("json",)), items(path, keep=("json",))
    for remote_one, local_one in zip(there, here, strict=True):
        assert remote_one.uri == address.replace(" ", "%20")
        fields = ("id", "size", "offset", "label", "carried", "problem")
        assert all(getattr(remote_one, each) == getattr(local_one, each) for each in fields)
    assert contents(there) == contents(here)
    put(pack(tmp_path / name, {f"other/{name}": each for name, each in pictures.items()}))
    # Within the second: it has the same mtime, and another etag.
    assert set(contents(there).values()) == {"bad_container"}
    assert read(there[0]).message.startswith("the tar has changed since it was listed")


def test_members_in_a_store_take_few_requests(bucket, tmp_path, monkeypatch):
    proxy, put = bucket
    path = pack(tmp_path / "small.tar", noise(500, 5_000))  # three megabytes
    address = put(path)
    some = items(address)
    assert len([method for method, *_ in proxy.requests if method == "GET"]) <= 4
    fetched = lengths_fetched(monkeypatch)
    assert list(contents(some).values()) == list(noise(500, 5_000).values())
    assert len(fetched) == 500 // 32 + 1
    assert sum(fetched) <= 1.05 * path.stat().st_size


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def followed(data, pool=None):
    """What the headers of a tar in a store say, looking ahead where there is a pool for it, and the
    bytes that were fetched for that."""
    fetched = []

    def fetch(start, length):
        fetched.append(len(data[start : start + length]))
        return data[start : start + length]

    file = Windowed(fetch, len(data), *IN_STORE)
    found = [
        each if isinstance(each, Damage)
        else (each.name, each.type, each.offset, each.offset_data, each.size, each.issparse())
        for each in headers(Ahead(file, pool) if pool else file)
    ]  # fmt: skip
    return found, sum(fetched)


def packed(folder, members, **options):
    return pack(folder / "t.tar", members, **options).read_bytes()


def test_headers_far_apart_are_fetched_without_what_lies_between(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "MEMBERS", 16)
    for form in tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT:
        long = "a long folder/" * (20 if form != tarfile.USTAR_FORMAT else 1)
        members = {f"{long}{name}": each for name, each in noise(150, 100_000).items()}
        data = packed(tmp_path, members, format=form)
        found, fetched = followed(data, pool)
        assert found == followed(data)[0] and len(found) == 150
        assert fetched < 0.12 * len(data)  # of so few a stretch, 0.07 to find the first
        assert fetched < 0.2 * followed(data)[1]


@pytest.mark.parametrize("many", [3, 16])
def test_looking_ahead_finds_what_following_finds(many, pool, tmp_path, monkeypatch):
    """However a tar misleads: stretches begin within tars in it, sparse members, damage."""
    monkeypatch.setattr(ahead, "MEMBERS", many)
    inner = packed(tmp_path, noise(9, 30_000))
    lone = tarfile.TarInfo("from within.jpg")
    lone.size = 170_000
    folder = unpack(tmp_path / "photos", noise(4, 150_000))
    for name in ("1.jpg", "2.jpg"):
        with open(folder / name, "r+b") as file:  # holes, and data between
            for place in range(10):
                file.seek(place * 1_000_000)
                file.write(b"x" * 5000)
    how = ["tar", "--sparse", "-cf", tmp_path / "s.tar", "-C", folder, "."]
    subprocess.run(how, check=True)
    sparse = (tmp_path / "s.tar").read_bytes().rstrip(b"\0")
    sparse += bytes(-len(sparse) % tarfile.BLOCKSIZE)
    rng = random.Random(0)
    plain = list(noise(60, 100_000).items())
    hostile = plain + [(f"{n}.tar", inner) for n in range(30)]
    hostile += [(f"{n}.bin", lone.tobuf() * 200) for n in range(30)]
    rng.shuffle(hostile)
    data = packed(tmp_path, hostile)
    assert len(followed(data, pool)[0]) == len(hostile)
    damaged = bytearray(data)
    for at in rng.sample(range(len(data) // 512), 50):
        damaged[at * 512 : at * 512 + 512] = rng.randbytes(512)
    body = packed(tmp_path, plain)[: 60 * (512 + 100_352)]
    for each in data, bytes(damaged), body + sparse + body, sparse + data, data[:-1_000_000], body:
        assert followed(each, pool)[0] == followed(each)[0]


def test_a_stretch_that_cannot_be_read_is_met_in_its_turn(pool, tmp_path):
    data = packed(tmp_path, noise(100, 100_000))

    def fetch(start, length):
        if start > 5_000_000:
            raise OSError(errno.ESTALE, "replaced")
        return data[start : start + length]

    told = []
    with pytest.raises(OSError, match="replaced"):
        for each in headers(Ahead(Windowed(fetch, len(data), *IN_STORE), pool)):
            told.append(each.name)
    assert len(told) >= 45


def test_a_tar_of_large_members_in_a_store_is_read_once_and_little_more(
    bucket, tmp_path, monkeypatch
):
    _, put = bucket
    monkeypatch.setattr(ahead, "MEMBERS", 16)
    path = pack(tmp_path / "large.tar", noise(100, 100_000))
    address = put(path)
    fetched = lengths_fetched(monkeypatch)
    there, here = items(address), items(path)
    assert [(a.id, a.offset, a.size) for a in there] == [(b.id, b.offset, b.size) for b in here]
    assert sum(fetched) < 0.15 * path.stat().st_size


def test_a_glob_in_a_store_stands_for_what_matches(bucket, tmp_path):
    _, put = bucket
    for name in ("b.tar", "a.tar", "README.md"):
        root = put(pack(tmp_path / name, {"1.jpg": b"1"})).rpartition("/")[0]
    for source in (f"{root}/*.tar", root):
        assert [item.id for item in items(source)] == ["a.tar#1.jpg", "b.tar#1.jpg"]
        assert listing([source]).roots == [source] and gone([source], []) is None
    assert gone([f"{root}/c*.tar"], []) == f"{root}/c*.tar"


def test_a_glob_and_a_folder_of_tars_stand_for_the_tars(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("b.tar", "a.tar.gz", "c.TGZ"):
        pack(shards / name, {"1.jpg": b"1"})
    for name in ("README.md", "a.json", ".hidden"):
        (shards / name).write_text("not an image")
    every = ["a.tar.gz#1.jpg", "b.tar#1.jpg", "c.TGZ#1.jpg"]
    assert [item.id for item in items(shards)] == every
    assert [item.id for item in items(f"{shards}/?.t[ag]*")] == every[:2]
    assert listing([f"{shards}/*.tar"]).roots == [f"{shards}/*.tar"]
    with pytest.raises(UsageError, match=r"shards/\*\.zip matches nothing"):
        listing([f"{shards}/*.zip"])
    # Another image there, and tars are passed over as before, and may be named themselves.
    (shards / "2.jpg").write_bytes(b"2")
    there = listing([str(shards)])
    assert [item.id for item in there] == ["2.jpg"] and there.skipped[".tar"] == 1
    both = items(shards, shards / "b.tar")
    assert [item.id for item in both] == ["shards/2.jpg", "shards/b.tar#1.jpg"]
    # A file that is really called so is no glob.
    pack(shards / "[b].tar", {"1.jpg": b"1"})
    assert [item.id for item in items(shards / "[b].tar")] == ["[b].tar#1.jpg"]


def test_a_tar_that_is_missing_is_gone(tmp_path):
    path = pack(tmp_path / "a.tar", {"1.jpg": b"1"})
    roots, unread = [str(path), f"{tmp_path}/*.tar"], [f"file://{path}"]
    assert gone(roots, unread) is None
    path.unlink()
    assert gone(roots[:1], unread) == roots[0]
    assert gone(roots[1:], unread) == roots[1]
    with pytest.raises(UsageError, match="does not exist"):
        listing(roots[:1])


def test_a_read_error_amid_the_headers_leaves_what_was_listed(tmp_path, monkeypatch):
    path, real = pack(tmp_path / "t.tar", noise(10, 20_000)), os.pread

    def failing(file, length, start):
        if start > 100_000:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, length, start)

    monkeypatch.setattr(os, "pread", failing)
    *whole, last = items(path)
    assert [item.problem for item in whole] == [None] * len(whole) and len(whole) >= 4
    assert (last.id, last.problem) == ("t.tar", "io_error: Input/output error")


def test_a_glob_passes_our_outputs_over_and_looks_into_folders_of_tars(tmp_path):
    for folder in ("shards1", "shards2"):
        (tmp_path / folder).mkdir()
        pack(tmp_path / folder / "a.tar", {"1.jpg": b"1"})
    (tmp_path / "shards-out" / "_resfeat").mkdir(parents=True)
    (tmp_path / "shards-out" / "1.jpg").touch()
    ids = [item.id for item in items(f"{tmp_path}/sh*")]
    assert ids == ["shards1/a.tar#1.jpg", "shards2/a.tar#1.jpg"]


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_a_tar_that_a_store_refuses_to_give_is_failures(name, bucket, tmp_path):
    proxy, put = bucket
    some = items(put(pack(tmp_path / name, {"1.jpg": b"1", "2.jpg": b"2"})))
    proxy.faults = lambda method, path: "403" if name in path else None
    assert contents(some) == dict.fromkeys([f"{name}#1.jpg", f"{name}#2.jpg"], "permission")
