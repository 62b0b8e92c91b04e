"""Whether a Ray cluster answers, asked before it is joined: Ray itself tries for many minutes."""

import json
import platform
import socket

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import InternalKVGetRequest
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub

from resfeat.errors import ResfeatError

SILENT = "is it the address of its head, and is that running?"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def reach(address: str, seconds: float) -> None:
    """Have a cluster answer. Raises ResfeatError where it does not do so within about so many
    seconds, wants a token, or runs another Ray; OSError where nobody listens."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    if not port.isdigit():
        raise ResfeatError("it has no port: give HOST:PORT")
    socket.create_connection((host, int(port)), seconds).close()
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
