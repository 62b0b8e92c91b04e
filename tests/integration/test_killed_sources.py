"""A run is killed half way, and the same command goes on: from each kind of source it reads nothing
of the shards that were committed, and does not list again.

What a server was asked for is counted there. A file gets other bytes between the two runs, under
the same size and mtime, which is all that is looked at: the images of the committed shards, and all
that only a listing reads (the headers of a tar, the ids of a table, its addresses). Had any of that
been read again and believed, there would be failure rows in place of embeddings, or other images.

Each takes 4 to 6 seconds, most of them for the children in which a run decodes with care what a
killed one had in hand. So all but two kinds are `more`.
"""

import csv
import io
import json
import os
import signal
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import azure
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import start
from gcs import GoogleStore
from object_store import FaultyProxy, ObjectStore
from PIL import Image
from seams import after_import
from tables import planned, rows

from resfeat.dataset import Layout
from resfeat.sources import Listing
from resfeat.storage import Fence, locate, remote, write_whole

COUNT, SHARD, KILLED_AFTER = 24, 4, 3
OPTIONS = ["--model", "cifar_resnet20", "--weights", "random:0", "--resize", "36", "--crop", "32",
           "--decode", "pillow", "--workers", 0, "--runtime", "torch",
           "--shard-size", SHARD]  # fmt: skip
BROKEN = (1, COUNT - 2)  # one in the first shard, one in the last
MORE = pytest.mark.more

# Run after "resfeat.dataset.commit": the process kills itself once some parts are committed.
DIES = f"""
import os, signal

committed = []

def on_step(step):
    if step == "embeddings":
        committed.append(step)
        if len(committed) == {KILLED_AFTER}:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def dying(tmp_path_factory):
    """The environment of a run that dies half way."""
    return after_import({"resfeat.dataset.commit": DIES}, tmp_path_factory.mktemp("dying"))


@pytest.fixture(scope="module")
def pictures():
    """Small pictures by name, two of them broken."""
    made = {}
    for n in range(COUNT):
        content = io.BytesIO()
        pixels = np.random.default_rng(n).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(content, "PNG")
        data = content.getvalue()
        made[f"photo-{n:02d}.png"] = data[: len(data) // 2] if n in BROKEN else data
    return made


def spoil(path, *extents):
    """Write other bytes over some of a file's, or over all; its size and mtime stay."""
    before = path.stat()
    with open(path, "r+b") as file:
        for start, end in extents or [(0, before.st_size)]:
            file.seek(start)
            file.write(os.urandom(end - start))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def rename_in(path):
    """Have a table of addresses name others; its size and mtime stay."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"photo-", b"other-"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Each kind gives what to extract, and what to do between the runs, of which it is told the items
# that are committed and those that are not. Counters of requests tell what the second run read.


def a_tar(pictures, tmp_path):
    path = pack(tmp_path / "a.tar", pictures)

    def between(done, left):
        headers = [(item.offset - tarfile.BLOCKSIZE, item.offset) for item in [*done, *left]]
        spoil(path, *headers, *((item.offset, item.offset + item.size) for item in done))

    return SimpleNamespace(arguments=[path], between=between)


def compressed_tars(pictures, tmp_path):
    """A shard each."""
    names = list(pictures)
    for n in range(0, COUNT, SHARD):
        some = {name: pictures[name] for name in names[n : n + SHARD]}
        pack(tmp_path / "tars" / f"{n:02d}.tar.gz", some)

    def between(done, left):
        for name in {item.id.partition("#")[0] for item in done}:
            spoil(tmp_path / "tars" / name)

    return SimpleNamespace(arguments=[tmp_path / "tars"], between=between)


def pack(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows_of_images(pictures, tmp_path):
    """Parquet, with a row group a shard."""
    path = tmp_path / "a.parquet"
    table = pa.table({"name": list(pictures), "image": list(pictures.values())})
    pq.write_table(table, path, row_group_size=SHARD)

    def between(done, left):
        about = pq.read_metadata(path)
        groups = {item.offset // SHARD for item in done}
        assert about.num_row_groups == COUNT // SHARD > len(groups) == len(done) / SHARD
        spoil(path, *(chunk(about, group, 0) for group in range(about.num_row_groups)),
              *(chunk(about, group, 1) for group in groups))  # fmt: skip

    return SimpleNamespace(arguments=[path, "--id-column", "name"], between=between)


def chunk(about, group, column):
    """Where the values of a row group's column begin and end."""
    told = about.row_group(group).column(column)
    first = told.dictionary_page_offset or told.data_page_offset
    return first, first + told.total_compressed_size


def files_in(folder, pictures):
    folder.mkdir()
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    return folder


def a_folder(pictures, tmp_path):
    folder = files_in(tmp_path / "photos", pictures)

    def between(done, left):
        for item in done:
            spoil(folder / item.id)
        (folder / "photo-00-new.png").write_bytes(b"which only a listing would find")

    return SimpleNamespace(arguments=[folder], between=between)


def a_table_of_paths(pictures, tmp_path):
    folder, table = files_in(tmp_path / "photos", pictures), tmp_path / "a.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["path"], *([f"photos/{name}"] for name in pictures)])

    def between(done, left):
        for item in done:
            spoil(folder / os.path.basename(item.id))
        rename_in(table)

    return SimpleNamespace(arguments=[table], between=between)


class Site(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked[self.path.rpartition("/")[2]] += 1
        super().do_GET()

    def log_message(self, *_): ...


def a_table_of_addresses(pictures, tmp_path):
    folder, table = files_in(tmp_path / "photos", pictures), tmp_path / "a.jsonl"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=folder))
    server.daemon_threads, server.asked = True, Counter()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    table.write_text("\n".join(json.dumps({"url": f"{root}/{name}"}) for name in pictures))

    def between(done, left):
        assert set(server.asked) >= {os.path.basename(item.id) for item in done}
        server.asked.clear()
        rename_in(table)

    def check(done, left):
        assert server.asked == Counter(os.path.basename(item.id) for item in left)
        server.shutdown()
        server.server_close()

    return SimpleNamespace(arguments=[table], between=between, check=check)


@pytest.fixture(scope="module")
def amazon():
    with ObjectStore() as store:
        store.files("photos")
        yield store.endpoint, "s3", lambda proxy: proxy.environment


@pytest.fixture(scope="module")
def google():
    with GoogleStore() as store:
        store.make("photos")
        yield store.endpoint, "gs", lambda proxy: {"STORAGE_EMULATOR_HOST": proxy.endpoint}


@pytest.fixture(scope="module")
def microsoft():
    if not azure.azurite():
        pytest.skip("azurite is not installed: npm install --prefix .venv azurite")
    with azure.AzureStore() as store:
        store.make("photos")
        yield store.endpoint, "az", lambda proxy: azure.environment(proxy.endpoint)


@pytest.fixture
def in_store(request, monkeypatch):
    """A proxy before the store of this name, and a folder of one's own in it."""
    endpoint, scheme, environment = request.getfixturevalue(request.param)
    with FaultyProxy(endpoint) as proxy:
        for name, value in environment(proxy).items():
            monkeypatch.setenv(name, value)
        remote.store.cache_clear()
        yield proxy, locate(f"{scheme}://photos/{os.urandom(4).hex()}")
    remote.store.cache_clear()


def reads(proxy):
    """(key, first byte, last byte) of all that was read, or (key,) where that was the whole."""
    found = []
    for path, extent in proxy.extents:
        key = unquote(urlsplit(path).path).rpartition("/")[2]
        found.append(
            (key, *map(int, extent.removeprefix("bytes=").split("-"))) if extent else (key,)
        )
    return found


def listings(proxy):
    return sum("prefix=" in path for method, path, _ in proxy.requests if method == "GET")


def a_prefix(pictures, proxy, folder):
    for name, content in pictures.items():
        write_whole(Fence(), folder / name, content)
    proxy.clear()
    before = []

    def between(done, left):
        before.append(listings(proxy))
        assert {(item.id,) for item in done} <= set(reads(proxy))
        write_whole(Fence(), folder / "photo-00-new.png", b"which only a listing would find")
        proxy.clear()

    def check(done, left):
        wanted = {item.id for item in left}
        assert {key for key, *_ in reads(proxy) if key.endswith(".png")} == wanted
        assert listings(proxy) < before[0]  # it looks whether anything is there

    return SimpleNamespace(arguments=[folder], between=between, check=check)


def a_tar_in_it(pictures, proxy, folder, tmp_path):
    write_whole(Fence(), folder / "a.tar", pack(tmp_path / "a.tar", pictures).read_bytes())
    proxy.clear()

    def between(done, left):
        assert reads(proxy)
        proxy.clear()

    def check(done, left):
        """Of the tar, whole shards that were left: from the first member's first byte to the last
        member's last."""
        shards = [left[n : n + SHARD] for n in range(0, len(left), SHARD)]
        windows = {("a.tar", some[0].offset, some[-1].offset + some[-1].size - 1)
                   for some in shards}  # fmt: skip
        assert set(reads(proxy)) == windows

    return SimpleNamespace(arguments=[folder / "a.tar"], between=between, check=check)


@pytest.fixture
def resumes(dying, resfeat, monkeypatch, tmp_path):
    """Run it undisturbed, have it killed, go on, and compare."""
    return partial(_resumes, dying, resfeat, monkeypatch, tmp_path)


def _resumes(dying, resfeat, monkeypatch, tmp_path, kind):
    command = ["extract", *kind.arguments, *OPTIONS, "--max-error-rate", 0.5, "-o"]
    unkilled = resfeat(*command, tmp_path / "unkilled")
    assert unkilled.returncode == 0, unkilled.stderr

    output = tmp_path / "out"
    killed = start(*command, output, env={**os.environ, **dying})
    _, complained = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, complained
    layout = Layout(output)
    shards = range(COUNT // SHARD)
    committed = layout.committed()
    assert KILLED_AFTER <= len(committed) < len(shards)
    of = {shard: planned(layout, shard) for shard in shards}
    done = [item for shard in committed for item in of[shard]]
    left = [item for shard in shards if shard not in committed for item in of[shard]]
    assert (len(done), len(left)) == (len(committed) * SHARD, COUNT - len(done))
    before = stamps(layout, committed)
    kind.between(done, left)

    with monkeypatch.context() as patched:
        patched.setattr(Listing, "tables", lambda self: pytest.fail("it lists again"))
        again = resfeat(*command, output)
    assert again.returncode == 0, again.stderr
    assert "was killed" in again.stderr
    assert stamps(layout, committed) == before
    for which, count in {"embeddings": COUNT - len(BROKEN), "failures": len(BROKEN)}.items():
        now = rows(output, which)
        assert len(now) == count and now.equals(rows(tmp_path / "unkilled", which))
    if check := getattr(kind, "check", None):
        check(done, left)


def stamps(layout, shards):
    """Which files the parts of these shards, their notes and the plan are, and when written."""
    files = [*layout.plan.iterdir(), *map(layout.note, shards)]
    for folder in layout.embeddings, layout.failures:
        parts = (folder / layout.part_name(shard) for shard in shards)
        files += [part for part in parts if part.exists()]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def also(*kinds):
    return (pytest.param(kind, marks=MORE) for kind in kinds)


LOCAL = [
    rows_of_images,
    *also(a_tar, compressed_tars, a_folder, a_table_of_paths, a_table_of_addresses),
]


@pytest.mark.parametrize("kind", LOCAL)
def test_killed_half_way(kind, pictures, resumes, tmp_path):
    (tmp_path / "in").mkdir()
    resumes(kind(pictures, tmp_path / "in"))


@MORE
@pytest.mark.parametrize("in_store", ["amazon", "google", "microsoft"], indirect=True)
def test_killed_half_way_through_a_prefix(in_store, pictures, resumes):
    resumes(a_prefix(pictures, *in_store))


@pytest.mark.parametrize("in_store", ["amazon", *also("google", "microsoft")], indirect=True)
def test_killed_half_way_through_a_tar_in_a_store(in_store, pictures, resumes, tmp_path):
    resumes(a_tar_in_it(pictures, *in_store, tmp_path))
