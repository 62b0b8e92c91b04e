"""Images on the web: a real server on loopback, kind and unkind."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

import pytest
import urllib3
from small import embed, failures_of, messages_of, vectors_of, write_pictures
from tables import rows

from resfeat.errors import Failure
from resfeat.sources import item_of, read
from resfeat.sources import web as images
from resfeat.storage import web

WRITTEN = "Wed, 21 Oct 2015 07:28:00 GMT"


class Site(http.server.BaseHTTPRequestHandler):
    """Serves a folder, and misbehaves by the first part of a path."""

    protocol_version = "HTTP/1.1"
    folder = None
    asked: ClassVar = Counter[str]()
    agents: ClassVar = set[str]()
    lock = threading.Lock()
    now = most = 0

    def do_GET(self):
        with self.lock:
            self.asked[self.path] += 1
            self.agents.add(self.headers["User-Agent"])
        first, _, rest = self.path[1:].partition("/")
        getattr(self, f"on_{first}", self.on_file)(rest)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def on_file(self, rest):
        body = (self.folder / unquote(urlsplit(self.path).path[1:])).read_bytes()
        self.answer(200, body, Last_Modified=WRITTEN)

    def on_n(self, rest):
        self.answer(200, sorted(self.folder.rglob("*.*"))[int(rest)].read_bytes())

    def on_status(self, rest):
        self.answer(int(rest), b"<html>no</html>")

    def on_then(self, rest):
        """Trouble, twice, then the picture."""
        if self.asked[self.path] > 2:
            return self.on_n("0")
        return self.answer(int(rest), Retry_After=0)

    def on_forever(self, rest):
        self.answer(302, Location=f"/forever/{int(rest) + 1}")

    def on_to(self, rest):
        self.answer(301, Location=rest)

    def on_html(self, rest):
        self.answer(200, b"\n<!DOCTYPE html><p>Sign in")

    def on_cut(self, rest):
        """The whole length, and half of the body: twice, or always."""
        body = sorted(self.folder.rglob("*.*"))[0].read_bytes()
        if rest == "twice" and self.asked[self.path] > 2:
            return self.answer(200, body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True
        return None

    def on_chunked(self, rest):
        """A picture in pieces, with no length told."""
        body = sorted(self.folder.rglob("*.*"))[0].read_bytes()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 1000):
            piece = body[start : start + 1000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def on_slow(self, rest):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(1000):
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:
                break
            time.sleep(0.05)
        self.close_connection = True

    def on_late(self, rest):
        with self.lock:
            Site.now += 1
            Site.most = max(Site.most, Site.now)
        time.sleep(0.1)
        with self.lock:  # before the answer, after which the next may come
            Site.now -= 1
        self.on_n("0")

    def on_large(self, rest):
        self.answer(200, bytes(3000))

    def on_empty(self, rest):
        self.answer(200)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    Site.folder = tmp_path_factory.mktemp("site")
    paths = write_pictures(Site.folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        yield SimpleNamespace(root=root, paths=paths)
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same patience in less time."""
    monkeypatch.setattr(web, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(web, "LONGEST_PAUSE", 0.01)
    Site.asked.clear()


def got(address):
    return read(item_of("")._replace(uri=address, size=None))


def table(folder, *lines):
    path = folder / "list.txt"
    path.write_text("\n".join(lines))
    return path


def test_the_web_gives_the_bits_of_the_directory(site, tmp_path):
    embed(tmp_path / "disk", *{path.parent for path in site.paths})
    source = table(
        tmp_path, *(f"{site.root}/{path.relative_to(Site.folder)}" for path in site.paths)
    )
    report = embed(tmp_path / "out", source, label_from="parent")
    assert (report.embedded, report.failed) == (len(site.paths), 0)
    there = vectors_of(tmp_path / "out")
    assert sorted(there.values()) == sorted(vectors_of(tmp_path / "disk").values())
    told = rows(tmp_path / "out")
    assert set(told["label"].to_pylist()) == {"a", "b b"}
    assert {when.isoformat() for when in told["mtime"].to_pylist()} == {"2015-10-21T07:28:00+00:00"}
    assert {agent.partition("/")[0] for agent in Site.agents} == {"resfeat"}


def test_what_an_answer_means(site):
    cases = {
        "status/404": ("not_found", "HTTP Error 404: Not Found", 1),
        "status/410": ("not_found", "HTTP Error 410", 1),
        "status/401": ("permission", "HTTP Error 401", 1),
        "status/403": ("permission", "HTTP Error 403", 1),
        "status/418": ("io_error", "HTTP Error 418", 1),
        "status/500": ("io_error", "HTTP Error 500", 4),
        "status/503": ("io_error", "HTTP Error 503", 4),
        "html/1.jpg": ("unidentified", "a page of HTML, and no image", 1),
        "empty/1.jpg": ("empty", "0 bytes", 1),
        "cut/always": ("io_error", "IncompleteRead", 4),
        "forever/0": ("io_error", "too many redirects", 1),
        "to/file:///etc/passwd": ("io_error", "No host", 1),
        "to/ftp://host/1.jpg": ("io_error", "ftp", 1),
    }
    for path, (reason, message, times) in cases.items():
        failure = got(f"{site.root}/{path}")
        assert isinstance(failure, Failure), path
        assert (failure.stage, failure.reason) == ("read", reason), failure
        assert message in failure.message, failure
        assert "0x" not in failure.message
        assert Site.asked[f"/{path}"] == times, path
    assert sum(path.startswith("/forever") for path in Site.asked) == web.REDIRECTS + 1


def test_trouble_that_passes_is_none(site, caplog):
    expected = sorted(Site.folder.rglob("*.*"))[0].read_bytes()
    for path in "then/500", "then/503", "then/429", "cut/twice", "to//n/0", f"to/{site.root}/n/0":
        data, size, mtime = got(f"{site.root}/{path}")
        assert (data, size, mtime) == (expected, len(expected), None), path
    assert caplog.records == []  # urllib3 would tell of each attempt


def test_trap_11_no_length_told_and_an_address_that_is_encoded_already(site):
    """Of obstore (see test_clouds.py): its own client for the web fails at the one and encodes the
    other once more."""
    expected = sorted(Site.folder.rglob("*.*"))[0]
    address = f"/{quote(str(expected.relative_to(Site.folder)))}?size=100%25&name=a%20b"
    assert "%20" in address and "%C3%A9" in address
    for path in "/chunked/1", address:
        assert got(site.root + path)[0] == expected.read_bytes()
        assert Site.asked[path] == 1


def test_nobody_waits_for_as_long_as_a_server_likes():
    answer = urllib3.HTTPResponse(headers={"Retry-After": "7200"}, status=503)
    assert web._patience().get_retry_after(answer) == web.MOST_SECONDS_BETWEEN
    assert web._patience().get_retry_after(urllib3.HTTPResponse(status=503)) is None


def test_a_slow_and_an_endless_body_are_given_up(site, monkeypatch):
    monkeypatch.setattr(web, "PIECE", 1)
    monkeypatch.setattr(images, "SECONDS", 0.2)
    failure = got(f"{site.root}/slow/1.jpg")
    assert (failure.reason, "bytes came in 0.2 s" in failure.message) == ("io_error", True)
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    failure = got(f"{site.root}/large/1.jpg")
    assert (failure.reason, failure.message) == ("too_large", "more than 1,000 bytes")


def test_no_server_is_a_failure():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failure = got(f"http://127.0.0.1:{port}/1.jpg")
    assert failure.reason == "io_error" and "refused" in failure.message
    assert got("http://no.such.host.invalid/1.jpg").reason == "io_error"
    assert got("http://[/1.jpg").reason == "io_error"


def test_a_host_is_not_asked_for_more_than_some_at_once(site):
    Site.most = 0
    threads = [
        threading.Thread(target=got, args=(f"{site.root}/late/{n}",))
        for n in range(2 * web.PER_HOST)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 < Site.most <= web.PER_HOST


def test_a_failure_gives_its_connection_back(site):
    def fail():
        for path in ("status/404", "large/1.jpg") * web.PER_HOST:
            with suppress(web.WebError):
                web.get(f"{site.root}/{path}", most=1000)

    thread = threading.Thread(target=fail, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_passwords_are_neither_sent_nor_shown(site, tmp_path):
    address = f"{site.root.replace('//', '//me:secret@')}/n/0"
    assert got(address).reason == "permission"
    embed(tmp_path / "out", table(tmp_path, address, f"{site.root}/n/1"))
    assert not any("n/0" in path for path in Site.asked)
    assert failures_of(tmp_path / "out") == {f"{site.root}/n/0": "permission"}
    for file in (tmp_path / "out").rglob("*.*"):
        assert b"secret" not in file.read_bytes(), file
    assert "secret" not in str(messages_of(tmp_path / "out"))


def test_a_proxy_is_used_where_the_variables_name_one(site, monkeypatch):
    monkeypatch.setenv("http_proxy", site.root)
    monkeypatch.setenv("no_proxy", "")
    got("http://images.invalid/1.jpg")
    assert Site.asked["http://images.invalid/1.jpg"]  # the proxy's answer, if only an error
