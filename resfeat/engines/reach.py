"""Whether a Ray cluster answers, asked without joining it: for that, Ray itself takes minutes."""

import json
import platform
import socket

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from resfeat.errors import ResfeatError


def reach(address: str, seconds: float) -> None:
    """Have a cluster answer. Raises ResfeatError where it is of another version, and whatever Ray
    or the network raises where there is none; Ray may then take longer than `seconds`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise ResfeatError("it has no port: give HOST:PORT, or ray://HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    if address.startswith("ray://"):
        import grpc  # type: ignore[import-untyped]

        channel = grpc.insecure_channel(address.removeprefix("ray://"))
        grpc.channel_ready_future(channel).result(timeout=seconds)
        return
    asked = GcsClient(address=address)
    told = json.loads(asked.internal_kv_get(b"CLUSTER_METADATA", b"cluster") or b"{}")
    for name, ours in (("ray", ray.__version__), ("python", platform.python_version())):
        theirs = told.get(f"{name}_version", ours)
        if theirs != ours:
            raise ResfeatError(f"it runs {name} {theirs}, and this is {ours}: have them the same")
