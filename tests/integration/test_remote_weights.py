"""Weights on a web server and on object stores, each a real server on loopback."""

import datetime
import http.server
import ipaddress
import re
import ssl
import threading

import azure
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from gcs import GoogleStore
from later import Later

from resfeat.backbones.weights import resolve
from resfeat.errors import ResfeatError, UsageError
from resfeat.spec import FeatureSpec
from resfeat.storage import Fence, locate, remote, write_whole

boto3 = Later("boto3")
moto = Later("moto.server")


def load(weights):
    return resolve(FeatureSpec(model="resnet18", weights=weights))


@pytest.fixture(scope="module")
def expected(checkpoint):
    return load(str(checkpoint)).identity


class Files(http.server.BaseHTTPRequestHandler):
    """Answers any path that ends in the checkpoint's name, as a web server and as Google do."""

    content = b""

    def do_GET(self):
        found = self.path.partition("?")[0].endswith("checkpoint.pth")
        body = self.content if found else b"no such file"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web(checkpoint):
    """A web server of one checkpoint; its port."""
    Files.content = checkpoint.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def secure_web(checkpoint, tmp_path_factory):
    """The same over TLS; its port, and the file of its certificate."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    Files.content = checkpoint.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], folder / "certificate.pem"
        server.shutdown()


@pytest.fixture
def bucket(checkpoint, monkeypatch):
    """An S3 API with the checkpoint in `models/`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    remote.store.cache_clear()
    store = boto3.client("s3", endpoint_url=endpoint)
    store.create_bucket(Bucket="models")
    store.upload_file(str(checkpoint), "models", "nets/checkpoint.pth")
    yield "s3://models/nets"
    server.stop()


def test_s3(bucket, expected):
    weights = load(f"{bucket}/checkpoint.pth")
    assert weights.identity == expected
    assert weights.origin == "s3://models/nets/checkpoint.pth"
    with pytest.raises(UsageError, match=r"s3://models/nets/none\.pth does not exist"):
        load(f"{bucket}/none.pth")


def test_https(secure_web, expected, monkeypatch):
    port, certificate = secure_web
    address = f"https://127.0.0.1:{port}/nets/checkpoint.pth"
    with pytest.raises(ResfeatError, match="CERTIFICATE_VERIFY_FAILED"):
        load(address)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    weights = load(f"{address}?signature=secret")
    assert weights.identity == expected
    assert weights.origin == address


def test_http(web, expected):
    assert load(f"http://127.0.0.1:{web}/checkpoint.pth").identity == expected
    with pytest.raises(ResfeatError, match=r"none\.pth: HTTP Error 404.*check its address"):
        load(f"http://127.0.0.1:{web}/none.pth")
    with pytest.raises(UsageError, match=r"ftp:// is not read; give a path or http"):
        load("ftp://127.0.0.1/none.pth")


def test_google(checkpoint, expected, monkeypatch):
    with GoogleStore() as store:
        store.make("models")
        store.put("models", "nets/checkpoint.pth", checkpoint.read_bytes())
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.endpoint)
        remote.store.cache_clear()
        assert load("gs://models/nets/checkpoint.pth").identity == expected
        with pytest.raises(UsageError, match=r"gs://models/nets/none\.pth does not exist"):
            load("gs://models/nets/none.pth")


@pytest.mark.skipif(not azure.azurite(), reason="azurite is not installed")
def test_azure(checkpoint, expected, monkeypatch):
    with azure.AzureStore() as store:
        store.make("models")
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        remote.store.cache_clear()
        place = locate("az://models/nets/checkpoint.pth")
        write_whole(Fence(), place, checkpoint.read_bytes())
        weights = load("az://models/nets/checkpoint.pth")
        assert weights.identity == expected
        assert weights.origin == "az://models/nets/checkpoint.pth"


def test_a_store_that_is_not_there_is_given_up(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    remote.store.cache_clear()
    with pytest.raises(ResfeatError) as told:
        load("s3://models/checkpoint.pth")
    assert re.fullmatch(
        r"cannot read weights s3://models/checkpoint\.pth: [^;]*; check the address, the AWS_\* "
        "variables and the network, and give the same command again",
        str(told.value),
    )
