"""As much of Google's storage API as obstore asks for: objects in memory, on loopback.

    with GoogleStore() as store:
        store.make("bucket")
        subprocess.run(..., env={**os.environ, **store.environment})

Reads, writes and deletions of an object, with conditions; listings in pages.
"""

import hashlib
import http.server
import threading
from email.utils import formatdate
from typing import NamedTuple
from urllib.parse import parse_qs, quote_plus, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000


class Object(NamedTuple):
    content: bytes
    generation: int
    written: float

    @property
    def headers(self):
        return {
            "ETag": f'"{hashlib.md5(self.content).hexdigest()}"',
            "x-goog-generation": str(self.generation),
            "Last-Modified": formatdate(self.written, usegmt=True),
        }


class GoogleStore:
    """The server. `buckets` maps names to objects by key."""

    def __init__(self):
        self.buckets, self.lock, self.generation = {}, threading.Lock(), 1

    def __enter__(self):
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.store = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self):
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def make(self, bucket):
        self.buckets[bucket] = {}

    def put(self, bucket, key, content):
        import time

        self.generation += 1
        self.buckets[bucket][key] = Object(content, self.generation, time.time())
        return self.buckets[bucket][key]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, store = urlsplit(self.path), self.server.store
        bucket, _, key = path.path.removeprefix("/").partition("/")
        with store.lock:
            if (objects := store.buckets.get(unquote(bucket))) is None:
                self.error(404, "NoSuchBucket")
            elif not key:
                self.listing(objects, {k: v[0] for k, v in parse_qs(path.query).items()})
            elif self.command == "PUT":
                self.write(unquote(bucket), unquote(key), content)
            elif (found := objects.get(unquote(key))) is None:
                self.error(404, "NoSuchKey")
            elif self.command == "DELETE":
                del objects[unquote(key)]
                self.reply(204, {})
            else:
                self.read(found)

    do_GET = do_HEAD = do_PUT = do_DELETE = answer  # noqa: N815

    def write(self, bucket, key, content):
        there = self.server.store.buckets[bucket].get(key)
        wanted = self.headers.get("x-goog-if-generation-match")
        if wanted and int(wanted) != (there.generation if there else 0):
            self.error(412, "PreconditionFailed")
        else:
            self.reply(200, self.server.store.put(bucket, key, content).headers)

    def read(self, found):
        headers, content = found.headers, found.content
        wanted = self.headers.get("If-Match")
        if wanted and wanted != headers["ETag"]:
            self.error(412, "PreconditionFailed")
        elif extent := self.headers.get("Range"):
            start, _, end = extent.removeprefix("bytes=").partition("-")
            start, end = int(start), min(int(end or len(content)) + 1, len(content))
            if start >= len(content):
                self.error(416, "InvalidRange")
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self.reply(206, headers, content[start:end])
        else:
            self.reply(200, headers, content)

    def listing(self, objects, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        after = query.get("continuation-token") or query.get("start-after") or ""
        encoded = quote_plus if query.get("encoding-type") == "url" else escape
        keys = sorted(key for key in objects if key.startswith(prefix) and key > after)
        folders = set()
        if delimiter:
            cut = {key: key.find("/", len(prefix)) + 1 for key in keys}
            folders = {key[: cut[key]] for key in keys if cut[key]}
            keys = [key for key in keys if not cut[key]]
        parts = [
            f"<Contents><Key>{encoded(key)}</Key><Size>{len(objects[key].content)}</Size>"
            f"<ETag>{escape(objects[key].headers['ETag'])}</ETag>"
            f"<LastModified>{_iso(objects[key].written)}</LastModified></Contents>"
            for key in keys[:PAGE]
        ]
        parts += [
            f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>"
            for each in sorted(folders)
        ]
        if encoded is quote_plus:
            parts.append("<EncodingType>url</EncodingType>")
        if is_more := len(keys) > PAGE:
            parts.append(f"<NextContinuationToken>{escape(keys[PAGE - 1])}</NextContinuationToken>")
        parts.append(f"<IsTruncated>{str(is_more).lower()}</IsTruncated>")
        body = f"<ListBucketResult>{''.join(parts)}</ListBucketResult>".encode()
        self.reply(200, {"Content-Type": "application/xml"}, body)

    def error(self, status, code):
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.reply(status, {"Content-Type": "application/xml"}, body)

    def reply(self, status, headers, body=b""):
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _iso(seconds):
    from datetime import UTC, datetime

    return (
        datetime.fromtimestamp(seconds, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
