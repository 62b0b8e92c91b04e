"""Where images live: how fast millions are planned, and what a store with a latency costs.

    python tests/benchmarks/sources.py [files|keys|rows|members|latency|tar]... [--scale 1.0]

files: a million empty files on a disk, listed in turns with a bare loop of scandir and stat, all in
the cache. keys: a million keys in a store, listed and planned. rows: ten million rows of a table.
members: a hundred thousand members of a tar, without their bytes. latency: a whole job from a store
in which each request takes 20 ms longer, in turns with the same from a disk. tar: a gigabyte with
members of three sizes, read from a store by two workers: bytes that the store sent. All of them by
default, each in a process of its own, so that its memory is its own. The store is a stub in another
process, on loopback.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import click
import pyarrow as pa
import pyarrow.parquet as pq

from resfeat.storage import remote

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "pipelines")]

TURNS = 9
LATENCY = 0.02
MEMBERS = 40_000, 100_000, 300_000
PAGE = 1000
LAST = "\U0010ffff"
MODEL = ["--model", "resnet18", "--weights", "random:0", "--workers", "0"]


class Stub(BaseHTTPRequestHandler):
    """As much of S3 as listing and reading take, of what `prepare` was given."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    keys: ClassVar[list[str]]
    folder: Path | None
    entries: bytes  # of a listing, in a row
    ends: ClassVar[list[int]]
    latency = 0.0
    sent: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        time.sleep(self.latency)
        self.sent["requests"] += 1
        self.sent["bytes"] += len(body) if self.command != "HEAD" else 0
        self.send_response_only(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/counts":
            body = json.dumps(self.sent).encode()
            self.sent.clear()
            self.send_response_only(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        elif query := parse_qs(url.query):
            self.answer(200, self.page({name: values[0] for name, values in query.items()}))
        else:
            self.file(unquote(url.path).removeprefix("/bucket/"))

    do_HEAD = do_GET  # noqa: N815

    def page(self, query: dict[str, str]) -> bytes:
        """A page of a listing, of bytes that are there: it is not the stub that is measured."""
        keys, prefix, most = self.keys, query.get("prefix", ""), int(query.get("max-keys", PAGE))
        after = query.get("continuation-token") or query.get("start-after")
        place = bisect_left(keys, max(prefix, f"{after}\0" if after else prefix))
        end = bisect_left(keys, prefix + LAST)
        if delimiter := query.get("delimiter"):
            pieces = list[bytes]()
            while place < end and len(pieces) < most:
                name, is_folder, _ = keys[place][len(prefix) :].partition(delimiter)
                folder = prefix + name + delimiter
                common = f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>".encode()
                pieces.append(common if is_folder else self.entry(place, place + 1))
                place = bisect_left(keys, folder + LAST) if is_folder else place + 1
            found, count = b"".join(pieces), len(pieces)
        else:
            first, place = place, min(end, place + most)
            found, count = self.entry(first, place), place - first
        more = place < end
        token = f"<NextContinuationToken>{keys[place - 1]}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>bucket</Name>'
            f"<KeyCount>{count}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        ).encode() + (found + b"</ListBucketResult>")

    @classmethod
    def prepare(cls, keys: Iterable[str], folder: Path | None) -> None:
        """Make what pages are made of. keys: sorted; folder: what holds them."""
        cls.keys, cls.folder = list(keys), folder
        entries = [
            f"<Contents><Key>{key}</Key><LastModified>2026-11-20T10:00:00.000Z</LastModified>"
            f'<ETag>"{place:x}"</ETag>'
            f"<Size>{(folder / key).stat().st_size if folder else 48_213}</Size></Contents>"
            for place, key in enumerate(cls.keys)
        ]
        cls.ends = [0, *accumulate(map(len, entries))]
        cls.entries = "".join(entries).encode("ascii")

    def entry(self, first: int, end: int) -> bytes:
        """Those of some keys."""
        return self.entries[self.ends[first] : self.ends[end]]

    def file(self, key: str) -> None:
        """An object, or a part of it."""
        about = {"Last_Modified": "Fri, 20 Nov 2026 10:00:00 GMT", "ETag": '"1"'}
        if not self.folder or not (path := self.folder / key).is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        size = path.stat().st_size
        if self.command == "HEAD":
            self.answer(200, b"", Content_Length=str(size), **about)
            return
        with open(path, "rb") as file:
            if not (wanted := self.headers.get("Range")):
                self.answer(200, file.read(), **about)
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, size - int(last))
            end = min(int(last), size - 1) if first and last else size - 1
            file.seek(start)
            about["Content_Range"] = f"bytes {start}-{end}/{size}"
            self.answer(206, file.read(end - start + 1), **about)


def serve(keys: Iterable[str], folder: Path | None, latency: float, port: object) -> None:
    Stub.prepare(keys, folder)
    Stub.latency = latency
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    port.put(server.server_port)  # type: ignore[attr-defined]
    server.serve_forever()


@contextmanager
def store(keys: Iterable[str], folder: Path | None = None, latency: float = 0.0) -> Iterator[str]:
    """A stub in another process, where the keys are made; gives its address, which is in the
    environment meanwhile."""
    context = multiprocessing.get_context("fork")
    port = context.Queue()
    process = context.Process(target=serve, args=(keys, folder, latency, port), daemon=True)
    process.start()
    address = f"http://127.0.0.1:{port.get()}"
    os.environ |= {
        "AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
    }  # fmt: skip
    remote.store.cache_clear()  # a client of another stub
    try:
        yield address
    finally:
        process.terminate()


def counts(address: str) -> dict[str, int]:
    """What the stub sent since this was asked last."""
    from urllib.request import urlopen

    with urlopen(f"{address}/counts") as answer:
        return Counter(json.loads(answer.read()))


def planned(source: str, **options: object) -> tuple[int, float]:
    """Items of a source, and the seconds that listing and planning them took."""
    from resfeat.plan import write_plan
    from resfeat.sources import listing
    from resfeat.spec import SourceOptions

    with tempfile.TemporaryDirectory() as name:
        folder, drafts = Path(name, "plan"), Path(name, "drafts")
        folder.mkdir()
        drafts.mkdir()
        started = time.perf_counter()
        there = listing([source], SourceOptions(**options))  # type: ignore[arg-type]
        items = write_plan(folder, drafts, there.tables(), None, there.carried).items
        return items, time.perf_counter() - started


def told(what: str, count: int, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what}: {count:,} in {seconds:.1f} s, {count / seconds:,.0f}/s; peak {peak:,.0f} MiB")


def files(scale: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        for number in range(int(1000 * scale)):
            folder = Path(name, f"{number:05d}")
            folder.mkdir()
            for each in range(1000):
                os.close(os.open(folder / f"IMG_{each:06d}.jpg", os.O_CREAT | os.O_WRONLY))
        ways = {"scandir and stat": scanned, "listed": listed}
        seconds = dict[str, list[float]]()
        for _ in range(TURNS):
            for way, look in ways.items():
                started = time.perf_counter()
                count = look(name)
                seconds.setdefault(way, []).append(time.perf_counter() - started)
    for way, each in seconds.items():
        rates = f"{count / min(each):,.0f}/s at best, {count / statistics.median(each):,.0f}/s"
        print(f"{count:,} files, {way}: {rates} in the middle of {TURNS}")
    least = min(seconds["listed"]) / min(seconds["scandir and stat"])
    each_turn = [ours / bare for bare, ours in zip(*seconds.values(), strict=True)]
    print(f"times as long: {least:.2f} at best, {statistics.median(each_turn):.2f} in the middle")
    told("files of a disk", count, min(seconds["listed"]))


def scanned(root: str) -> int:
    """How many files there are, each looked at as little as can be."""
    folders, count = [root], 0
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    entry.stat()
                    count += 1
    return count


def listed(root: str) -> int:
    from resfeat.sources import listing
    from resfeat.spec import SourceOptions

    return sum(table.num_rows for table in listing([root], SourceOptions()).tables())


def keys(scale: float) -> None:
    count = int(1000 * scale)
    for latency in (0.0, LATENCY):
        names = (f"photos/{a:05d}/IMG_{b:06d}.jpg" for a in range(count) for b in range(1000))
        with store(names, latency=latency):
            told(f"keys of a store, {latency * 1000:.0f} ms", *planned("s3://bucket/photos"))


def rows(scale: float) -> None:
    count, at_once = int(10_000_000 * scale), 1_000_000
    with tempfile.TemporaryDirectory() as name:
        for kind in ("parquet", "csv"):
            path = Path(name, f"table.{kind}")
            schema = pa.schema([("uri", pa.string()), ("caption", pa.string())])
            with _writer(path, schema) as writer:
                for start in range(0, count, at_once):
                    numbers = range(start, min(count, start + at_once))
                    uris = [f"s3://bucket/photos/{n // 1000}/IMG_{n:09d}.jpg" for n in numbers]
                    captions = ["a photograph of something"] * len(numbers)
                    writer.write_table(pa.table([uris, captions], schema=schema))
            told(f"rows of a table ({kind})", *planned(str(path), keep=("caption",)))
            path.unlink()


def _writer(path: Path, schema: pa.Schema) -> object:
    import pyarrow.csv

    return (pq.ParquetWriter if path.suffix == ".parquet" else pyarrow.csv.CSVWriter)(path, schema)


def members(scale: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "photos.tar")
        tar_of(path, int(100_000 * scale), 20_000)
        told("members of a tar", *planned(str(path)))


def tar_of(path: Path, count: int, size: int, content: bytes = b"") -> None:
    content = content or os.urandom(size)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def latency(scale: float) -> None:
    """A whole job with the fastest model here, int8 ResNet-18, by the rate of its own report."""
    from bench import USUAL, prepare

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, int(600 * scale), USUAL, "resnet18")
        here = sorted(str(path.relative_to(folder)) for path in (folder / "in").rglob("*.jpg"))
        with store(here, folder, LATENCY) as address:
            pairs = []
            for number in range(3):
                disk = extracted(folder / "in", folder / f"disk{number}")
                counts(address)
                remote = extracted("s3://bucket/in", folder / f"store{number}")
                sent = counts(address)
                pairs.append((disk, remote))
    share = statistics.median(remote / disk for disk, remote in pairs)
    disk, remote = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    print(
        f"int8 ResNet-18 from a disk {disk:.1f}/s, from a store with {LATENCY * 1000:.0f} ms "
        f"{remote:.1f}/s: {share:.2f}; {sent['requests'] / len(here):.2f} requests and "
        f"{sent['bytes'] / len(here) / 1000:.1f} kB an image"
    )


def extracted(source: object, output: Path, *options: str) -> float:
    """Images a second, as the report of a run has them."""
    command = [sys.executable, "-m", "resfeat", "extract", str(source), "-o", str(output)]
    command += [*MODEL, "--precision", "int8", "--log-json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == 0, report["reasons"]
    return float(report["images_per_second"])


def tar(scale: float) -> None:
    for size in MEMBERS:
        with tempfile.TemporaryDirectory() as name:
            _tar_of_members(Path(name), int(1e9 * scale / size), size)


def _tar_of_members(folder: Path, count: int, size: int) -> None:
    """A tar of small pictures with bytes behind them: it is about reading, not about decoding."""
    from PIL import Image

    picture = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(picture, "JPEG")
    tar_of(folder / "photos.tar", count, size, picture.getvalue().ljust(size, b"\0"))
    size = (folder / "photos.tar").stat().st_size
    command = [sys.executable, "-m", "resfeat", "extract", "s3://bucket/photos.tar", "-o",
               str(folder / "out"), "--model", "cifar_resnet20", "--weights", "random:0",
               "--workers", "2", "--log-json"]  # fmt: skip
    with store(["photos.tar"], folder) as address:
        _, seconds = planned("s3://bucket/photos.tar")
        listed = counts(address)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["failed"] == 0
        sent = counts(address)
    with store(["photos.tar"], folder, LATENCY):
        _, late = planned("s3://bucket/photos.tar")
    print(
        f"a tar of {size / 1e9:.2f} GB, {count:,} members: headers {listed['bytes'] / size:.3f} of "
        f"its bytes in {listed['requests']:,} requests and {seconds:.1f} s ({late:.1f} s with "
        f"{LATENCY * 1000:.0f} ms); in all, read by two workers, {sent['bytes'] / size:.3f} in "
        f"{sent['requests']:,}",
        flush=True,
    )


PARTS = {each.__name__: each for each in (files, keys, rows, members, latency, tar)}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--scale", default=1.0, show_default=True, help="Of the numbers above.")
def main(parts: tuple[str, ...], scale: float) -> None:
    if len(parts) == 1:
        PARTS[parts[0]](scale)
        return
    for part in parts or PARTS:
        command = [sys.executable, __file__, part, "--scale", str(scale)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
