"""Whether a Ray cluster answers, asked before it is joined: Ray itself tries for many minutes."""

import json
import logging
import os
import platform
import socket
from contextlib import suppress
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import InternalKVGetRequest
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub

from resfeat.errors import ResfeatError

CLIENT = "ray://"
SILENT = "is it the address of its head, and is that running?"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def address_of(asked: str | None) -> str | None:
    """The cluster that is asked for, or the one that `auto` and nothing stand for: that of
    RAY_ADDRESS, or the last that was started here. None where there is neither."""
    for told in (asked, os.environ.get("RAY_ADDRESS")):
        if told not in (None, "", "auto"):
            return told
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if not os.access(file, os.R_OK):
        return None
    _take_own_token()
    return file.read_text().strip()


def _take_own_token() -> None:
    """Use the token in this user's home, as Ray does for a cluster that it finds by itself, and for
    no other: whoever is told it may run code in this user's clusters."""
    logging.getLogger("ray").setLevel(logging.ERROR)  # it says so at length
    with suppress(ImportError):  # an older Ray, whose clusters want none by default
        from ray._private.authentication import authentication_token_setup as setup

        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def reach(address: str, seconds: float) -> None:
    """Have a cluster answer. Raises ResfeatError where it does not do so within about so many
    seconds, wants a token, or runs another Ray; OSError where nobody listens."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    if not port.isdigit():
        raise ResfeatError("it has no port: give HOST:PORT, or ray://HOST:PORT")
    socket.create_connection((host, int(port)), seconds).close()
    if address.startswith(CLIENT):
        with grpc.insecure_channel(address.removeprefix(CLIENT)) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=seconds)
            except grpc.FutureTimeoutError as error:
                raise ResfeatError(f"no answer within {seconds:g} s: {SILENT}") from error
        return
    if host in LOOPBACK:
        _check_own(int(port), seconds)
    told = _metadata(address, seconds)
    for name, ours in (("ray", ray.__version__), ("python", platform.python_version())):
        theirs = told.get(f"{name}_version", ours)
        if theirs != ours:
            raise ResfeatError(f"it runs {name} {theirs}, and this is {ours}: have them the same")


def _check_own(port: int, seconds: float) -> None:
    """Raise ConnectionError where a Ray listens on loopback alone, and would not be found: Ray
    takes that for this machine's own address, and asks there for many minutes."""
    from ray.util import get_node_ip_address

    own = get_node_ip_address()
    try:
        socket.create_connection((own, port), seconds).close()
    except OSError as error:
        raise ConnectionError(
            f"it listens on loopback, and Ray would look for it at {own}: start it with "
            f"--node-ip-address {own}, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
        ) from error


def _metadata(address: str, seconds: float) -> dict[str, str]:
    """What the head of a cluster says of itself. Ray's own client for this would ask for minutes,
    also where it is refused."""
    asked = InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
    with init_grpc_channel(address) as channel:
        try:
            told = InternalKVGcsServiceStub(channel).InternalKVGet(asked, timeout=seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ResfeatError(
                    "it wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                    "RAY_AUTH_TOKEN_PATH as on its head"
                ) from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ResfeatError(f"no answer within {seconds:g} s: {SILENT}") from error
            why = f"it is no head of a Ray ({error.details()}): check --address"
            raise ResfeatError(why) from error
    answer: dict[str, str] = json.loads(told.value or b"{}")
    return answer
