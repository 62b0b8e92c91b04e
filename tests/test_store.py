"""Objects behind pathlib's interface, and what happens to them when requests fail.

What is tested runs in a process of its own: the store and the proxy are threads of this one.
"""

import errno
import io
import multiprocessing
import os
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from later import Later
from object_store import FaultyProxy, ObjectStore

from resfeat.errors import StoreError, UsageError
from resfeat.storage import (
    Fence,
    draft,
    locate,
    open_parquet,
    remote,
    sha256,
    write_whole,
)

boto3 = Later("boto3")

LARGE = 12 * 1024**2  # more than obstore would send in one piece
MANY = 5  # faults, one after the other
MORE = pytest.mark.more


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as server:
        yield server


@pytest.fixture(scope="module")
def through(server):
    with FaultyProxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def pool(through):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in through.environment.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(int).result()  # it has the environment now
            yield pool


@pytest.fixture
def elsewhere(pool):
    """Call a function in the other process."""
    return lambda function, *args: pool.submit(function, *args).result(timeout=200)


@pytest.fixture
def proxy(through):
    through.requests.clear()
    yield through
    through.faults, through.down, through.stall = (), False, 60.0


@pytest.fixture
def objects(server):
    """Another client's view of a bucket of one's own."""
    resource = boto3.resource(
        "s3", endpoint_url=server.endpoint, region_name="us-east-1",
        aws_access_key_id="testing", aws_secret_access_key="testing",
    )  # fmt: skip
    bucket = resource.Bucket(f"bucket-{uuid.uuid4().hex}")
    bucket.create()
    return bucket


@pytest.fixture
def root(objects):
    return locate(f"s3://{objects.name}")


def content(objects):
    """All objects; a name that ends in a slash is the marker of a folder."""
    every = objects.objects.all()
    return {each.key: each.get()["Body"].read() for each in every if not each.key.endswith("/")}


def faults(proxy):
    return [fault for *_, fault in proxy.requests if fault]


def test_a_path_is_read_as_an_address_or_as_a_file():
    assert locate("s3://bucket/a/b.parquet").parent.name == "a"
    assert str(locate("s3://bucket/a/") / "b") == "s3://bucket/a/b"
    assert str(locate("s3://bucket/a/b.xml").with_suffix(".bin")) == "s3://bucket/a/b.bin"
    assert locate("here") == Path.cwd() / "here"


@pytest.mark.parametrize("address", ["s3://", "s3:///key", "s3://bucket/a/../b", "s3://bucket/.."])
def test_an_address_that_names_no_object_is_refused(address):
    with pytest.raises(UsageError, match=f"'{address}' is no address"):
        locate(address)


@pytest.mark.parametrize(
    "address", ["gcs://bucket/out", "s3a://bucket/out", "hdfs://host/out", "s3:/a/path/of/it"]
)
def test_an_address_of_another_kind_is_refused_and_not_taken_for_a_folder(address):
    with pytest.raises(UsageError, match=f"'{address}' is no address"):
        locate(address)


def test_what_was_written_is_read_listed_and_removed(elsewhere, root, objects):
    elsewhere(write_whole, Fence(), root / "a/b/1", b"one")
    elsewhere(write_whole, Fence(), root / "a/2", b"")
    assert content(objects) == {"a/b/1": b"one", "a/2": b""}
    assert elsewhere((root / "a/b/1").read_bytes) == b"one"
    assert elsewhere((root / "a/2").read_bytes) == b""
    assert {path.name for path in elsewhere(names_below, root / "a")} == {"2", "b"}
    assert elsewhere((root / "a").is_dir) and not elsewhere((root / "a/2").is_dir)
    assert elsewhere((root / "a/2").exists) and not elsewhere((root / "a/3").exists)
    elsewhere((root / "a/2").unlink)
    assert content(objects) == {"a/b/1": b"one"}


def names_below(path):
    return list(path.iterdir())


def test_what_is_not_there_is_not_found(elsewhere, root, proxy):
    for operation in ((root / "no").read_bytes, (root / "no").unlink):
        with pytest.raises(FileNotFoundError):
            elsewhere(operation)
    assert len(proxy.requests) <= 3  # and not asked for again
    elsewhere((root / "no").unlink, True)
    assert elsewhere(names_below, root / "no") == []


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        *(("503", 3), ("lost", 3), ("cut", LARGE)),
        *(pytest.param(fault, LARGE, marks=MORE) for fault in ("500", "reset", "lost")),
    ],
)
def test_a_write_gets_through_and_is_whole(fault, size, elsewhere, root, objects, proxy):
    coming = iter([fault] * MANY)
    proxy.faults = lambda method, _: next(coming, None) if method == "PUT" else None
    elsewhere(write_whole, Fence(), root / "key", b"x" * size)
    assert 1 < len(faults(proxy)) <= MANY  # fewer, where it is seen to be there
    assert content(objects) == {"key": b"x" * size}


@pytest.mark.parametrize(
    "fault", ["cut", *(pytest.param(each, marks=MORE) for each in ("503", "reset", "lost"))]
)
def test_a_read_gets_through_and_is_whole(fault, elsewhere, root, objects, proxy):
    objects.put_object(Key="key", Body=b"x" * LARGE)
    proxy.faults = [fault] * MANY
    assert elsewhere((root / "key").read_bytes) == b"x" * LARGE
    assert len(faults(proxy)) == MANY


@pytest.mark.parametrize("size", [3, pytest.param(LARGE, marks=MORE)])
def test_a_write_that_fails_for_good_leaves_what_was_there(size, elsewhere, root, objects, proxy):
    objects.put_object(Key="key", Body=b"before")
    proxy.faults = lambda method, _: "500" if method in ("PUT", "POST") else None
    with pytest.raises(StoreError, match=f"^{root}/key: .*give the same command again"):
        elsewhere(write_once, root / "key", b"x" * size)
    assert len(faults(proxy)) == 2
    assert content(objects) == {"key": b"before"}


def write_once(path, content):
    """Without patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "ATTEMPTS", 1)
        remote.store.cache_clear()
        try:
            write_whole(Fence(), path, content)
        finally:
            remote.store.cache_clear()


def test_a_refusal_is_not_asked_again(elsewhere, root, proxy):
    proxy.faults = lambda *_: "403"
    with pytest.raises(StoreError, match=r"403 Forbidden .AccessDenied"):
        elsewhere((root / "key").create, b"x")
    assert len(proxy.requests) <= 2


def test_a_bucket_that_is_missing_is_not_asked_for_again(elsewhere, root, proxy):
    nowhere = locate(f"{root}-not/key")
    with pytest.raises(StoreError, match=f"^{nowhere}: there is no bucket {root}-not"):
        elsewhere(nowhere.create, b"x")
    assert len(proxy.requests) <= 2


def test_nothing_is_left_of_an_upload_in_parts(elsewhere, root, objects, server):
    elsewhere(write_whole, Fence(), root / "key", b"x" * LARGE)
    client = objects.meta.client
    assert not client.list_multipart_uploads(Bucket=objects.name).get("Uploads")


def test_a_create_of_which_the_answer_was_lost_is_known_as_our_own(elsewhere, root, proxy):
    losses = iter(["lost"])
    proxy.faults = lambda method, path: next(losses, None) if method == "PUT" else None
    assert elsewhere((root / "created").create, b"ours")
    assert elsewhere((root / "created").create, b"theirs") is None
    assert elsewhere((root / "created").read_bytes) == b"ours"


def test_a_removal_of_which_the_answer_was_lost_is_done(elsewhere, root, objects, proxy):
    """The next attempt finds nothing, which is what was wanted."""

    def lose(method, _):
        return next(losses, None) if method == "DELETE" else None

    objects.put_object(Key="a", Body=b"x")
    losses = iter(["lost"] * MANY)
    proxy.faults = lose
    elsewhere((root / "a").unlink)
    assert faults(proxy) == ["lost"] * MANY
    assert content(objects) == {}


def test_a_draft_is_seen_once_it_is_published(elsewhere, root, objects):
    digest = elsewhere(publish, root / "a" / "part.parquet")
    (given,) = content(objects).values()
    assert pq.read_table(io.BytesIO(given)).to_pydict() == {"x": [1, 2, 3]}
    assert digest == (True, True)
    elsewhere(write_whole, Fence(), root / "note", b"text")
    assert content(objects)["note"] == b"text"


def publish(target):
    """Whether there is nothing before, and whether the digest is that of what is there after."""
    import hashlib

    whole = draft(Fence(), target.name)
    pq.write_table(pa.table({"x": [1, 2, 3]}), whole.sink)
    before = sha256(whole)
    unseen = not target.exists()
    whole.publish(target)
    whole.discard()
    return unseen, hashlib.sha256(target.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("fault", ["cut", pytest.param("500", marks=MORE)])
def test_parquet_is_read_to_its_end_whatever_befalls_a_piece(
    fault, elsewhere, root, objects, proxy
):
    numbers = pa.array(range(125_000))
    table = pa.table(dict.fromkeys("abcde", numbers))
    written = io.BytesIO()
    pq.write_table(table, written, row_group_size=5_000, compression="none")
    objects.put_object(Key="t.parquet", Body=written.getvalue())
    proxy.faults = [None] * 3 + [fault] * MANY  # once it is open
    assert elsewhere(read_parquet, root / "t.parquet").equals(table)
    assert len(faults(proxy)) == MANY
    pieces = sum((method, fault) == ("GET", None) for method, _, fault in proxy.requests)
    # 5 MB: not all of it at once, and not each of 125 columns by itself.
    assert 5 <= pieces <= 12


def test_parquet_that_is_not_there_is_not_found(elsewhere, root):
    with pytest.raises(FileNotFoundError):
        elsewhere(read_parquet, root / "t.parquet")


def read_parquet(location):
    with open_parquet(location) as file:
        groups = range(file.num_row_groups)
        return pa.concat_tables(file.read_row_group(n, use_threads=False) for n in groups)


def test_a_file_is_published_whole_and_durably_in_one_step(tmp_path, monkeypatch):
    """The bytes reach the disk before the name does, and the name before anybody goes on."""
    done = []

    def spied(name):
        call = getattr(os, name)

        def spy(first, *rest):
            where = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else first
            done.append((name, str(where)))
            return call(first, *rest)

        monkeypatch.setattr(os, name, spy)

    drafts, target = tmp_path / "drafts", tmp_path / "there" / "file"
    for folder in (drafts, target.parent):
        folder.mkdir()
    target.write_bytes(b"before")
    spied("fsync")
    spied("replace")
    write_whole(drafts, target, b"after")
    assert target.read_bytes() == b"after" and not list(drafts.iterdir())
    (first, draft), second, *folders = done
    assert (first, second) == ("fsync", ("replace", draft))
    assert draft.startswith(str(drafts))
    assert set(folders) == {("fsync", str(target.parent)), ("fsync", str(drafts))}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_obstacle_but_a_broken_disk_is(
    number, tmp_path, monkeypatch
):
    fsync = os.fsync

    def without_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", without_folders)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            write_whole(tmp_path, tmp_path / "file", b"x")
    else:
        write_whole(tmp_path, tmp_path / "file", b"x")
        assert (tmp_path / "file").read_bytes() == b"x"
