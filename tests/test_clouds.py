"""The same of S3, Google's and Azure's stores, each a real server on loopback: what obstore makes
of their answers, and what we make of that. Its traps are numbered as they were met; the eleventh is
in test_web.py."""

import ast
import io
import os
import tomllib
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen

import azure
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gcs import GoogleStore
from object_store import FaultyProxy, ObjectStore

import resfeat
from resfeat.errors import StoreError, UsageError
from resfeat.sources import item_of, listing, read
from resfeat.storage import (
    ChangedError,
    Fence,
    MissingBucketError,
    RefusedError,
    clouds,
    dataset_of,
    fetch,
    locate,
    open_binary,
    open_parquet,
    pages,
    remote,
    stat,
    write_whole,
)

SOURCES = sorted(Path(resfeat.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def amazon():
    with ObjectStore() as store:
        store.client().create_bucket(Bucket="bucket")
        yield store.endpoint, "s3://bucket"


@pytest.fixture(scope="module")
def google():
    with GoogleStore() as store:
        store.make("bucket")
        yield store.endpoint, "gs://bucket"


@pytest.fixture(scope="module")
def microsoft():
    if not azure.azurite():
        pytest.skip("azurite is not installed: npm install --prefix .venv azurite")
    with azure.AzureStore() as store:
        store.make("bucket")
        yield store.endpoint, "az://bucket"


def environment(proxy, root):
    return {
        "s3": proxy.environment,
        "gs": {"STORAGE_EMULATOR_HOST": proxy.endpoint},
        "az": azure.environment(proxy.endpoint),
    }[root.partition(":")[0]]


@pytest.fixture(params=["amazon", "google", "microsoft"])
def cloud(request, monkeypatch):
    """A proxy before a store, and a folder there of one's own."""
    endpoint, root = request.getfixturevalue(request.param)
    with FaultyProxy(endpoint) as proxy:
        for name, value in environment(proxy, root).items():
            monkeypatch.setenv(name, value)
        remote.store.cache_clear()
        yield proxy, locate(root) / os.urandom(4).hex()
    remote.store.cache_clear()


def put(path, content):
    write_whole(Fence(), path, content)


def test_objects_are_written_read_listed_and_removed(cloud):
    _, folder = cloud
    for name, content in {
        "a b%41.jpg": b"one",
        "b/\u00e9.jpg": b"",
        "b/2": b"x" * 3_000_000,
    }.items():
        put(folder / name, content)
        assert (folder / name).read_bytes() == content
    assert {each.name for each in folder.iterdir()} == {"a b%41.jpg", "b"}
    assert (folder / "b").is_dir() and not (folder / "b" / "2").is_dir()
    (folder / "b" / "2").unlink()
    assert not (folder / "b" / "2").exists()
    for name in "a b%41.jpg", "b/\u00e9.jpg":
        (folder / name).unlink()
    assert not folder.exists() and list(folder.iterdir()) == []


@pytest.mark.parametrize("fault", ["lost", "cut", "reset", "503"])
def test_trap_1_an_answer_to_our_own_write_is_lost(fault, cloud):
    """The next attempt meets what the first one wrote, and the store calls it another's."""
    proxy, folder = cloud
    proxy.faults = [fault]
    first = (folder / "lock").create(b"mine 1")
    assert first and (folder / "lock").read_versioned() == (b"mine 1", first)
    assert (folder / "lock").version() == first and (folder / "other").version() is None
    assert (folder / "lock").create(b"yours") is None
    proxy.faults = [fault]
    second = (folder / "lock").swap(b"mine 2", first)
    assert second and (folder / "lock").read_versioned() == (b"mine 2", second)
    assert (folder / "lock").swap(b"yours", first) is None
    assert (folder / "lock").read_bytes() == b"mine 2"


def test_trap_2_a_conflict_of_two_that_write_at_once_wrote_nothing(cloud):
    proxy, folder = cloud
    proxy.faults = ["409"]
    version = (folder / "lock").create(b"mine")
    assert (folder / "lock").read_versioned() == (b"mine", version)
    proxy.faults = ["409"]
    assert (folder / "lock").swap(b"mine 2", version)
    assert (folder / "lock").read_bytes() == b"mine 2"


def test_trap_3_a_version_is_what_a_write_or_a_read_gave(cloud):
    _, folder = cloud
    created = (folder / "lock").create(b"1")
    assert None not in created.mode.values()
    _, seen = (folder / "lock").read_versioned()
    assert (folder / "lock").swap(b"2", seen) and not (folder / "lock").swap(b"3", created)
    (folder / "lock").unlink()
    assert (folder / "lock").swap(b"4", seen) is None
    assert not (folder / "lock").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "lock").read_versioned()


def test_trap_4_what_is_missing_refused_and_broken_is_told_apart(cloud, monkeypatch):
    proxy, folder = cloud
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    remote.store.cache_clear()
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    nowhere = locate(f"{folder.root}-not") / "key"
    for operation in (nowhere.read_bytes, nowhere.is_dir, lambda: nowhere.create(b"x")):
        with pytest.raises(MissingBucketError, match=f"there is no bucket {folder.root}-not"):
            operation()
    for fault, error in {"403": RefusedError, "503": StoreError}.items():
        proxy.faults = lambda *_, fault=fault: fault
        for operation in (
            (folder / "x").read_bytes, folder.is_dir,
            lambda: (folder / "x").create(b"x"), (folder / "x").unlink,
        ):  # fmt: skip
            with pytest.raises(StoreError, match=fault) as told:
                operation()
            assert type(told.value) is error and "\n" not in str(told.value)


@pytest.mark.parametrize("faults", ["503 cut", "503 lost", "503 reset", "500 reset cut"])
def test_trap_4_what_breaks_off_after_a_refusal_is_asked_again(faults, cloud, monkeypatch):
    """obstore sends it again after the refusal, and says so in the error of what then broke off."""
    proxy, folder = cloud
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(clouds, "FIRST_PAUSE", timedelta(milliseconds=1))
    remote.store.cache_clear()
    for name, content in {"small": b"x", "large": b"x" * 3_000_000, "old": b"x"}.items():
        put(folder / name, content)
    for operation, expected in {
        (folder / "small").read_bytes: b"x",
        (folder / "large").read_bytes: b"x" * 3_000_000,
        lambda: fetch(folder / "large", 9, 9).data: b"x" * 9,
        lambda: stat(folder / "small")[0]: 1,
        (folder / "none").version: None,
        folder.is_dir: True,
        lambda: len(list(folder.iterdir())): 3,
        lambda: sum(len(page.keys) for page in pages(folder)): 3,
        (folder / "old").unlink: None,
        lambda: put(folder / "new", b"y" * 3_000_000): None,
        lambda: bool((folder / "lock").create(b"mine")): True,
    }.items():
        proxy.faults = (coming := iter(faults.split()))
        assert operation() == expected
        assert next(coming, None) is None
    proxy.faults = faults.split()
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    assert (folder / "new").read_bytes() == b"y" * 3_000_000 and not (folder / "old").exists()


@pytest.mark.parametrize("cloud", ["amazon"], indirect=True)
@pytest.mark.parametrize(("fault", "most"), [("reset", 6), ("stall", 3)])
def test_trap_4_what_obstore_has_given_up_is_not_asked_again(fault, most, cloud, monkeypatch):
    """After as many resets as it may meet, or as many seconds as it may wait."""
    proxy, folder = cloud
    for name, value in {"ATTEMPTS": 5, "REQUEST_SECONDS": 1, "RETRY_SECONDS": 3}.items():
        monkeypatch.setattr(remote, name, value)
    remote.store.cache_clear()
    proxy.faults = lambda *_: fault
    with pytest.raises(StoreError):
        (folder / "key").read_bytes()
    assert 1 < len(proxy.requests) <= most  # else they would be six times as many


@pytest.mark.parametrize("key", ["a//1.jpg", "a/./1.jpg", "a/../1.jpg"])
def test_trap_5_a_key_that_no_path_has_does_not_end_the_listing(key, google, cloud):
    proxy, folder = cloud
    if folder.root != "gs://bucket":
        pytest.skip("S3's is in test_prefix.py; azurite takes no such key")
    put(folder / "a/0.jpg", b"x")
    put(folder / "z.jpg", b"x")
    odd = f"{proxy.endpoint}/bucket/{folder.key}/{key}"
    urlopen(Request(odd, data=b"x", method="PUT")).close()
    there = listing([str(folder)])
    assert [item.id for item in there] == ["a/0.jpg", "z.jpg"]
    assert there.skipped == {"unusable key": 1}


def test_trap_6_nothing_forks_a_process_that_has_used_a_store():
    """A forked child's requests hang. What we start is another program, or Ray's."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [getattr(node, "module", None) or "", *(each.name for each in node.names)]
                assert not {"multiprocessing", "multiprocessing.pool", "fork"} & set(names), path
                assert "ProcessPoolExecutor" not in names, path


def test_traps_7_and_8_no_request_and_no_pause_is_long(cloud):
    """A signal waits until a request has ended, so each has limits."""
    _, folder = cloud
    client = folder.store
    assert client.retry_config["backoff"]["max_backoff"] == timedelta(seconds=1)
    assert client.retry_config["retry_timeout"] == timedelta(seconds=remote.RETRY_SECONDS)
    assert client.client_options["read_timeout"] == f"{remote.REQUEST_SECONDS}s"
    assert client.client_options["timeout"] == f"{remote.WHOLE_SECONDS // 60}m"


@pytest.mark.parametrize("kind", ["get", "create", "list"])
def test_trap_7_what_stalls_is_given_up_and_asked_again(kind, cloud, monkeypatch):
    proxy, folder = cloud
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 1)
    remote.store.cache_clear()
    put(folder / "there", b"x")
    proxy.faults = ["stall"]
    if kind == "get":
        assert (folder / "there").read_bytes() == b"x"
    elif kind == "create":
        assert (folder / "new").create(b"mine")
    else:
        assert folder.is_dir()
    assert [fault for *_, fault in proxy.requests if fault] == ["stall"]


def test_trap_9_an_account_of_azures_must_be_named(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    remote.store.cache_clear()
    with pytest.raises(UsageError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        locate("az://container/x").exists()
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"AccountName=mine;AccountKey={azure.KEY};BlobEndpoint=http://127.0.0.1:9/mine",
    )
    config = remote.store("az://container").config
    assert (config["account_name"], config["endpoint"]) == ("mine", "http://127.0.0.1:9/mine")
    config = remote.store("abfss://container@theirs.dfs.core.windows.net").config
    assert (config["account_name"], config["container_name"]) == ("theirs", "container")
    remote.store.cache_clear()


def test_trap_9_profiles_regions_and_anonymous_access_of_amazons(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[mine]\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    (tmp_path / ".aws" / "config").write_text("[profile mine]\nregion = eu-north-1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    remote.store.cache_clear()
    client = remote.store("s3://bucket")
    assert client.config["region"] == "eu-north-1"
    assert client.credential_provider()["access_key_id"] == "a"
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    remote.store.cache_clear()
    client = remote.store("s3://bucket")
    assert client.credential_provider is None and client.config["region"] == "us-west-2"
    remote.store.cache_clear()


def test_trap_10_parquet_is_read_from_each(cloud):
    _, folder = cloud
    table = pa.table({"x": range(1000)})
    written = io.BytesIO()
    pq.write_table(table, written)
    for name in ("1.parquet", "2.parquet"):
        put(folder / name, written.getvalue())
    with open_parquet(folder / "1.parquet") as file:
        assert file.read(use_threads=False).equals(table)
    dataset = dataset_of(folder)
    assert dataset.count_rows() == 2000
    assert dataset.to_table().equals(pa.concat_tables([table, table]))


def test_trap_12_the_oldest_python_is_what_obstore_needs():
    project = tomllib.loads((SOURCES[0].parents[1] / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"


def test_trap_13_pieces_that_lie_apart_are_asked_for_apart(cloud):
    proxy, folder = cloud
    content = bytes(range(256)) * 1000
    put(folder / "x", content)
    proxy.requests.clear()
    with open_binary(folder / "x", window=1000) as file:
        for start in (0, 500, 100_000, 100_500):
            file.seek(start)
            assert file.read(100) == content[start : start + 100]
        assert file.seek(0, io.SEEK_END) == len(content) and file.read(1) == b""
    assert [method for method, *_ in proxy.requests] == ["HEAD", "GET", "GET"]


def test_a_piece_comes_with_what_is_known_of_the_whole(cloud):
    proxy, folder = cloud
    path = folder / "a b%41.jpg"
    put(path, b"0123456789")
    size, mtime, etag = stat(path)
    assert size == 10 and mtime % 1_000_000 == 0
    proxy.requests.clear()
    assert fetch(path) == (b"0123456789", 10, mtime, etag)
    assert fetch(path, 3, 4, etag=etag) == (b"3456", 10, mtime, etag)
    assert fetch(path, 8, 4) == (b"89", 10, mtime, etag)
    assert fetch(path, most=9) == (b"", 10, mtime, etag)
    assert [method for method, *_ in proxy.requests] == ["GET"] * 4
    assert fetch(path, 10, 4) == (b"", 10, mtime, etag)
    put(path, b"another")
    with pytest.raises(ChangedError, match="was replaced"):
        fetch(path, etag=etag)
    with pytest.raises(FileNotFoundError):
        stat(folder / "none")


def test_an_open_file_that_is_replaced_is_told(cloud):
    _, folder = cloud
    put(folder / "x", b"1" * 5000)
    with open_binary(folder / "x", window=1000) as file:
        assert file.read(10) == b"1" * 10
        put(folder / "x", b"2" * 5000)
        file.seek(3000)
        with pytest.raises(ChangedError):
            file.read(10)


def test_images_are_listed_and_read_from_each(cloud):
    _, folder = cloud
    names = ["a b%41.jpg", "b-/1.jpg", "b/1.jpg", "b.jpg", "\u65e5/\u8a9e.png"]
    for name in names:
        put(folder / "in" / name, name.encode())
    put(folder / "in" / "out/_resfeat/spec.json", b"{}")
    put(folder / "in" / "out/9.jpg", b"x")
    there = listing([str(folder / "in")])
    items = list(there)
    assert [item.id for item in items] == sorted(names, key=str.encode)
    assert there.skipped == {"resfeat output": 1}
    for item in items:
        data, size, mtime = read(item)[:3]
        assert (data.decode(), size, mtime) == (item.id, item.size, item.mtime)
    assert read(item_of(f"{folder}/none.jpg")).reason == "not_found"


KEYS = {"in": "directory", "in/a": "directory", "in/a/1.jpg": "file", "in/empty": "directory"}


class WithFolders(BaseHTTPRequestHandler):
    """What an account of Azure's with a hierarchical namespace answers: its folders are keys."""

    BLOB = (
        "<Blob><Name>{}</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT"
        "</Last-Modified><Etag>0x1</Etag><ResourceType>{}</ResourceType><Content-Length>{}"
        "</Content-Length><Content-Type>image/jpeg</Content-Type><BlobType>BlockBlob</BlobType></Properties></Blob>"
    )

    def do_GET(self):
        if "comp=list" not in self.path:
            self.send_error(404)
            return
        asked = {name: some[0] for name, some in parse_qs(urlsplit(self.path).query).items()}
        every = (
            self.BLOB.format(key, kind, 3 * (kind == "file"))
            for key, kind in KEYS.items()
            if key.startswith(asked.get("prefix", ""))
        )
        blobs = f"<Blobs>{''.join(every)}</Blobs><NextMarker/>"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"<EnumerationResults>{blobs}</EnumerationResults>".encode())

    def do_HEAD(self):
        key = unquote(urlsplit(self.path).path.removeprefix("/mine/container/"))
        kind = KEYS.get(key)
        self.send_response(200 if kind else 404)
        self.send_header("x-ms-resource-type", kind or "")
        self.send_header("Content-Length", str(3 * (kind == "file")))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", "0x1")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_folders_that_azure_has_as_keys_are_no_images(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WithFolders)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", azure.KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/mine")
    remote.store.cache_clear()
    for source in "az://container/in", "az://container":
        assert [item.uri for item in listing([source])] == ["az://container/in/a/1.jpg"]
    folder = locate("az://container/in")
    assert folder.is_dir() and folder.exists() and folder.version() is None
    assert not (folder / "empty").exists()
    remote.store.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("bad", [False, True])
def test_a_long_listing_in_stretches_is_whole_and_in_key_order(bad, monkeypatch):
    """One level of few folders above many, objects beside them, and more than a page of all."""
    keys = [f"in/{top}/{n:02d}/{m:03d}.jpg" for top in "ab" for n in range(20) for m in range(90)]
    keys += [f"in/b/0{n}.jpg" for n in range(10)] + ["in/b-/1.jpg", "in/z.jpg"]
    markers = [f"in/{top}/{n:02d}/" for top in "ab" for n in range(20)]
    empty = [f"in/b/{n:02d}" for n in range(10)]  # beside its marker
    odd = ["in/a/07//1.jpg", "in/b/./1.jpg"] if bad else []
    with GoogleStore() as store, FaultyProxy(store.endpoint) as proxy:
        store.make("bucket")
        for key in keys + odd:
            store.put("bucket", key, b"x")
        for key in markers + empty:
            store.put("bucket", key, b"")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        remote.store.cache_clear()
        there = listing(["gs://bucket/in"])
        assert [f"in/{item.id}" for item in there] == sorted(keys + empty)
        assert there.skipped == ({"unusable key": 2} if bad else {})
        assert bad or sum("start-after" in path for _, path, _ in proxy.requests) > 4
    remote.store.cache_clear()


def test_no_signature_is_told_to_anybody(monkeypatch):
    """A shared access signature is a part of each address, and errors name addresses."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2021&sig=SECRET")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9/mine")
    monkeypatch.setattr(remote, "ATTEMPTS", 0)
    remote.store.cache_clear()
    with pytest.raises(StoreError) as told:
        locate("az://container/x").read_bytes()
    assert "SECRET" not in str(told.value) and "127.0.0.1" not in str(told.value)
    remote.store.cache_clear()
