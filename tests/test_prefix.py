"""Listing and reading prefixes of a bucket, against the same tree in a directory."""

import threading
import uuid
from collections import Counter
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from later import Later
from object_store import FaultyProxy, ObjectStore

from resfeat.errors import Failure, StoreError, UsageError
from resfeat.sources import item_of, listing, read, rules
from resfeat.spec import SourceOptions
from resfeat.storage import remote as stores

moto = Later("moto.s3.models")

ODD = ["a b.jpg", "100%.jpg", "%41.jpg", "a+b.jpg", "#1.jpg", "what?.jpg", "-rf.jpg", " lead.jpg",
       "\u00e9.jpg", "e\u0301.jpg", "\u65e5\u672c/\u8a9e.png", "a&b=c;d.jpg", "[a]*.jpg", "'\".jpg",
       "back\\x41.jpg", "s3:/x.jpg", "a" * 251 + ".jpg", "B/1.jpg", "b/1.jpg", "b.jpg", "b-/1.jpg",
       "b/2/3/4.jpg"]  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as server:
        yield server


@pytest.fixture
def proxy(server, monkeypatch):
    with FaultyProxy(server.endpoint) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        stores.store.cache_clear()
        yield proxy


@pytest.fixture
def put(server, proxy):
    """Put objects, each of which holds its own key; gives the address of their bucket."""
    name = f"bucket-{uuid.uuid4().hex}"
    client = server.client()
    client.create_bucket(Bucket=name)

    def put(*keys, body=None):
        for key in keys:
            client.put_object(Bucket=name, Key=key, Body=key.encode() if body is None else body)
        return f"s3://{name}"

    return put


def ids(*sources):
    return [item.id for item in listing([str(source) for source in sources])]


def test_a_tree_gives_the_same_ids_in_the_same_order_as_on_a_disk(put, tmp_path):
    others = [".DS_Store", "x/.hidden/1.jpg", "x/.hidden/deeper/2.jpg", "x/1.json",
              "out/_resfeat/spec.json", "out/embeddings/part-00000.parquet"]  # fmt: skip
    for name in [*ODD, *others]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"deep/in/{name}".encode())
    (tmp_path / "empty folder").mkdir()
    put("deep/in/empty folder/", body=b"")
    root = put(*(f"deep/in/{name}" for name in [*ODD, *others]))
    here, there = listing([str(tmp_path)]), listing([f"{root}/deep/in"])
    on_disk, in_store = list(here), list(there)
    assert [item.id for item in in_store] == [item.id for item in on_disk]
    assert len(in_store) == len(ODD)
    assert [item.size for item in in_store] == [item.size for item in on_disk]
    assert there.skipped == here.skipped == {"hidden": 2, ".json": 1, "resfeat output": 1}
    for item in in_store:
        data, size, mtime = read(item)
        # The bytes are the key: had its name been misread, they would be those of another.
        key = f"deep/in/{item.id}" if "\\" not in item.id else "deep/in/back\\x41.jpg"
        assert (data.decode(), size, mtime) == (key, item.size, item.mtime)
        assert item.uri == f"{root}/{quote(key)}"


def test_an_object_beside_its_own_prefix_is_an_image_like_those_below_it(put):
    root = put("in/a", "in/a/b", "in/a/b/c")
    assert ids(f"{root}/in") == ["a", "a/b", "a/b/c"]
    for name in ("in/a", "in/a/b", "in/a/b/c"):
        assert read(item_of(f"{root}/{name}"))[0] == name.encode()


@pytest.mark.parametrize(
    "key", ["in//1.jpg", "in/./1.jpg", "in/../1.jpg", "in/x/..", "in/x/.", "in/x//", "in/x//y/z"]
)
def test_a_key_that_no_path_can_have_is_counted_and_never_followed(key, put):
    root = put(key, "1.jpg", "in/1.png", "in/x/1.jpg")
    there = listing([f"{root}/in"])
    assert [item.id for item in there] == ["1.png", "x/1.jpg"]
    assert there.skipped == {"unusable key": 1}


def test_a_marker_of_a_folder_is_no_image(put):
    root = put("in/1.jpg", "in/2.jpg")
    put("in/", "in/empty/", "in/full/", body=b"")
    put("in/full/3.jpg")
    there = listing([f"{root}/in"])
    assert [item.id for item in there] == ["1.jpg", "2.jpg", "full/3.jpg"]
    assert there.skipped == {}


def test_an_empty_object_beside_the_marker_of_its_name_is_there_once(put, proxy):
    """obstore lists both as `in/a`, with others between them."""
    root = put("in/a", "in/a/", "in/b/", "in/c", "in/d/", "in/e/", body=b"")
    put("in/a-b.jpg", "in/a/1.jpg", "in/d", "in/d/2.jpg", "in/e")
    proxy.requests.clear()
    there = listing([f"{root}/in"])
    assert [item.id for item in there] == ["a", "a-b.jpg", "a/1.jpg", "c", "d", "d/2.jpg", "e"]
    assert there.skipped == {}
    # Of the others the keys before them tell enough.
    asked = {path.partition("/in/")[2] for method, path, _ in proxy.requests if method == "HEAD"}
    assert asked == {"", "a", "b", "c"}


def test_empty_objects_are_asked_for_at_once(put, proxy):
    names = [f"{number}.jpg" for number in range(8)]
    root = put(*(f"in/{name}" for name in names), body=b"")
    all_here = threading.Barrier(len(names))
    proxy.delay = lambda: 0 * all_here.wait(timeout=30)
    proxy.faults = lambda method, path: "delayed" if "HEAD" in method and "jpg" in path else None
    assert ids(f"{root}/in") == names


def test_several_prefixes_and_single_objects_count_from_their_common_parent(put):
    root = put("x/train/1.jpg", "x/val/1.jpg", "x/single.jpg", "x/other.jpg")
    assert ids(f"{root}/x/val", f"{root}/x/train/") == ["train/1.jpg", "val/1.jpg"]
    assert ids(f"{root}/x/single.jpg", f"{root}/x/train") == ["single.jpg", "train/1.jpg"]
    assert ids(f"{root}/x/single.jpg") == ["single.jpg"]
    assert ids(root) == ["x/other.jpg", "x/single.jpg", "x/train/1.jpg", "x/val/1.jpg"]


def test_the_folder_of_an_image_is_what_it_is_called_in_the_key(put):
    root = put("in/a +%41/1.jpg")
    (item,) = listing([f"{root}/in"], SourceOptions(label_from="parent"))
    assert item.label == "a +%41"


def test_sources_that_overlap_or_are_missing_are_refused(put):
    root = put("a/b/1.jpg", "a b/2.jpg", "out/_resfeat/spec.json")
    with pytest.raises(UsageError, match="lies within"):
        ids(f"{root}/a", f"{root}/a b", f"{root}/a/b")
    with pytest.raises(UsageError, match="lies within"):
        ids(root, f"{root}/a")
    for missing in (f"{root}/nowhere", f"{root}/a/b/1", f"{root}-not/a"):
        with pytest.raises(UsageError, match=f"source {missing} does not exist"):
            ids(missing)
    with pytest.raises(UsageError, match="is a resfeat dataset"):
        ids(f"{root}/out")


@pytest.mark.parametrize("tail", ["/in/../1.jpg", "/in/./1.jpg", "/./in", "/in//1.jpg"])
def test_an_address_that_would_name_another_object_is_refused(tail, put):
    root = put("in/1.jpg", "1.jpg")
    with pytest.raises(UsageError, match="an empty part"):
        ids(root + tail)


@pytest.mark.parametrize("address", ["s3://", "s3:///x"])
def test_an_address_without_a_bucket_is_refused(address, put):
    put("1.jpg")
    with pytest.raises(UsageError, match="an empty part"):
        ids(address)


def test_a_listing_of_more_than_a_page_is_whole_whatever_befalls_the_second(put, proxy):
    names = [f"{number:04d}" for number in range(1_010)]
    root = put()
    store = moto.s3_backends["123456789012"]["aws"]  # a request for each would take twenty seconds
    for name in names:
        store.put_object(root.removeprefix("s3://"), f"in/{name}", name.encode())
    befalls = iter(["cut", "reset", "503", "lost"])
    # What was broken off in the middle is asked for behind the last key, and not by the token.
    second = ("continuation-token", "start-after")
    proxy.faults = lambda _, path: next(befalls, None) if any(s in path for s in second) else None
    assert ids(f"{root}/in") == names
    assert Counter(fault for *_, fault in proxy.requests if fault).total() == 4


def test_an_empty_object_is_a_failure(put):
    root = put("1.jpg", body=b"")
    assert read(item_of(f"{root}/1.jpg")).reason == "empty"


def test_an_image_within_an_object_of_several_is_asked_for_alone(put, proxy):
    root = put("several.bin", body=b"0123456789")
    part = item_of(f"{root}/several.bin")._replace(offset=3, size=4)
    proxy.requests.clear()
    data, size, mtime = read(part)
    assert (data, size) == (b"3456", 4) and mtime == read(item_of(part.uri))[2]
    assert read(part._replace(offset=7)).reason == "bad_container"


def test_a_file_over_the_limit_is_not_read(put, proxy, monkeypatch):
    root = put("small.jpg", body=b"x" * 1000)
    put("large.jpg", body=b"x" * 1001)
    monkeypatch.setattr(rules, "MAX_BYTES", 1000)
    assert read(item_of(f"{root}/small.jpg"))[1] == 1000
    failure = read(item_of(f"{root}/large.jpg"))
    assert (failure.stage, failure.reason) == ("read", "too_large")
    assert "1,001 bytes; 1,000 at most" in failure.message


def test_an_object_that_is_gone_or_forbidden_is_a_failure(put, proxy):
    root = put("1.jpg", "2.jpg")
    assert read(item_of(f"{root}/gone.jpg")) == Failure("read", "not_found", "no such object")
    proxy.faults = lambda _, path: "403" if "1.jpg" in path else None
    proxy.requests.clear()
    assert read(item_of(f"{root}/1.jpg")).reason == "permission"
    assert len(proxy.requests) == 1  # asking again would not help
    assert read(item_of(f"{root}/2.jpg"))[0] == b"2.jpg"


def test_an_object_that_cannot_be_read_is_a_failure_and_a_store_that_cannot_is_an_error(
    put, proxy, monkeypatch
):
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    root = put("1.jpg")
    proxy.faults = lambda _, path: "500" if "1.jpg" in path else None
    assert read(item_of(f"{root}/1.jpg")).reason == "io_error"
    proxy.down = True
    with pytest.raises(StoreError, match=f"^{root}"):
        read(item_of(f"{root}/1.jpg"))


def test_the_time_of_an_object_is_that_of_its_content(put):
    before = datetime.now(UTC).timestamp()
    root = put("in/1.jpg")
    (item,) = listing([f"{root}/in"])
    assert before - 1 <= item.mtime / 1e6 <= datetime.now(UTC).timestamp()
    assert read(item)[2] == item.mtime


def test_the_folders_above_a_source_are_not_looked_at(put, proxy):
    root = put("in/1.jpg", "else/2.jpg")
    assert ids(f"{root}/in") == ["1.jpg"]
    assert not any("else" in path for _, path, _ in proxy.requests)
