"""An S3 API on loopback, and a proxy in front of it that does what bad networks do.

    with ObjectStore() as store, FaultyProxy(store.endpoint) as proxy:
        files = store.files("bucket")  # straight to the store
        proxy.faults = RandomFaults(0.2, seed=1)  # or ["reset", None, "503"], or any rule
        subprocess.run(..., env={**os.environ, **proxy.environment})
        assert proxy.requests[0] == ("HEAD", "/bucket/key", "reset")

What is stored belongs to the process, not to one `ObjectStore`: the end of one empties all.
"""

import http.client
import http.server
import logging
import random
import socket
import struct
import sys
import threading
from collections import Counter
from contextlib import closing, nullcontext
from urllib.parse import urlsplit
from urllib.request import urlopen

from later import Later
from pyarrow.fs import S3FileSystem, SubTreeFileSystem

boto3 = Later("boto3")
moto = Later("moto.server")

ERRORS = {
    "403": "AccessDenied",
    "409": "ConditionalRequestConflict",
    "500": "InternalError",
    "503": "SlowDown",
}
FAULTS = {*ERRORS, "reset", "stall", "cut", "lost", "delayed", "late"}
PER_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


class Endpoint:
    """Where an S3 API is, and how to talk to it."""

    @property
    def environment(self):
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
        regions = dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "us-east-1")
        address = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
        return {**address, **keys, **regions}

    def system(self, **options):
        """The S3FileSystem of this endpoint, whatever the environment says."""
        keys = {"access_key": "testing", "secret_key": "testing", "region": "us-east-1"}
        return S3FileSystem(**{"endpoint_override": self.endpoint, **keys, **options})

    def client(self):
        """Amazon's own client of this endpoint, whatever the environment says."""
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def resource(self):
        """The same, by buckets and objects."""
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.resource("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)


class ObjectStore(Endpoint):
    """moto's S3."""

    def __enter__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line per request
        self._server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.endpoint = "http://{}:{}".format(*self._server.get_host_and_port())
        return self

    def __exit__(self, *_):
        urlopen(f"{self.endpoint}/moto-api/reset", data=b"").close()
        self._server.stop()

    def files(self, bucket):
        """A bucket, made where there is none."""
        system = self.system(allow_bucket_creation=True)
        system.create_dir(bucket)
        return SubTreeFileSystem(bucket, system)


class RandomFaults:
    """A rule: any request fails with a probability, the same one at most `most` times in a row."""

    def __init__(self, probability, kinds=("500", "503", "reset", "cut"), seed=0, most=2):
        self.probability, self.kinds, self.most = probability, tuple(kinds), most
        self._random, self._failed = random.Random(seed), Counter()

    def __call__(self, method, path):
        if self._random.random() < self.probability and self._failed[method, path] < self.most:
            self._failed[method, path] += 1
            return self._random.choice(self.kinds)
        self._failed[method, path] = 0
        return None


class FaultyProxy(Endpoint):
    """Passes requests on to `upstream`, except for its faults.

    `faults` is a rule, `(method, path with its query) -> fault or None`, or else lists what
    befalls the next requests: "403", "409", "500" or "503" in place of the answer; "reset" before
    the body is read; "stall", nothing for `stall` seconds and then the end of the connection; or,
    after it took effect, "cut", half of the answer's body (no answer where it has none), or "lost",
    no answer. "delayed" passes it on after `delay()` seconds, even if the client has given up by
    then; "late" answers after them. `requests` lists all that came, as `(method, path, fault)`, and
    `extents` which bytes each GET of an object asked for, as `(path, its Range or None)`. While
    `down` is true, all are reset.
    """

    delay = staticmethod(lambda: 1.0)

    def __init__(self, upstream, faults=(), stall=60.0):
        self.upstream = urlsplit(upstream).netloc
        self.faults, self.stall, self.down = faults, stall, False
        self.requests, self.extents, self._lock = [], [], threading.Lock()
        self.closed = threading.Event()
        self.turn = threading.Lock()

    @property
    def faults(self):
        return self._rule

    @faults.setter
    def faults(self, faults):
        coming = None if callable(faults) else iter(faults)
        self._rule = faults if coming is None else lambda *_: next(coming, None)

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.down = True  # to the connections that are kept alive
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def clear(self):
        """Forget what came."""
        self.requests.clear()
        self.extents.clear()

    def fault(self, method, path):
        with self._lock:
            fault = "reset" if self.down else self._rule(method, path)
            assert fault is None or fault in FAULTS, fault
            self.requests.append((method, path, fault))
            return fault


def _passed(headers):
    return {name: headers[name] for name in headers if name.lower() not in PER_CONNECTION}


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def shutdown_request(self, request):
        request.close()  # without a FIN ahead of it, so that a reset is one

    def handle_error(self, *request):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away
            super().handle_error(*request)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        proxy = self.server.proxy
        if self.command == "GET" and "prefix=" not in self.path:
            proxy.extents.append((self.path, self.headers["Range"]))
        fault = proxy.fault(self.command, self.path)
        content = b"" if fault == "reset" else self.content()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault == "stall":
            proxy.closed.wait(proxy.stall)
        elif fault in ERRORS:
            error = f"<Error><Code>{ERRORS[fault]}</Code><Message>a fault</Message></Error>"
            self.reply(int(fault), {"Content-Type": "application/xml"}, error.encode())
        else:
            if fault == "delayed":
                proxy.closed.wait(proxy.delay())
            status, headers, body = self.forward(proxy.upstream, content)
            if fault == "late":
                proxy.closed.wait(proxy.delay())
            if fault in (None, "delayed", "late") or (fault == "cut" and body):
                self.reply(status, headers, body, cut=fault == "cut")
        self.close_connection |= fault in ("reset", "stall", "cut", "lost")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def content(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            length = int(self.headers.get("Content-Length", 0))
            content = self.rfile.read(length)
            if len(content) < length:  # not to be passed on as if it were whole
                raise ConnectionError("the client went away")
            return content
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size + 2)[:-2])
        while self.rfile.readline().strip():  # what trails the last chunk
            pass
        return b"".join(chunks)

    def forward(self, upstream, content):
        # moto looks at a condition and then writes, in two steps; a store does it in one.
        is_conditional = "If-Match" in self.headers or "If-None-Match" in self.headers
        turn = self.server.proxy.turn if is_conditional else nullcontext()
        with turn, closing(http.client.HTTPConnection(upstream)) as connection:
            connection.request(self.command, self.path, content, _passed(self.headers))
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def reply(self, status, headers, body, cut=False):
        head = self.command == "HEAD"  # told the length of what it is spared
        self.send_response_only(status)
        for name, value in _passed(headers).items():
            self.send_header(name, value)
        if status != 204:
            length = headers.get("Content-Length", 0) if head else len(body)
            self.send_header("Content-Length", length)
        self.end_headers()
        if not head:
            self.wfile.write(body[: len(body) // 2] if cut else body)
