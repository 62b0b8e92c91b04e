"""What a Ray cluster says of workers that wait for a machine, and of machines that are to come."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.autoscaler_pb2 import (
    GetClusterStatusReply,
    GetClusterStatusRequest,
    NodeStatus,
    ResourceRequest,
)
from ray.core.generated.autoscaler_pb2_grpc import AutoscalerStateServiceStub

SECONDS = 5.0  # for the cluster's head to answer
ALIVE = (NodeStatus.RUNNING, NodeStatus.IDLE)
# As Ray names them, and as actors ask for them.
RESOURCES = {"CPU": "num_cpus", "GPU": "num_gpus"}


@dataclass(frozen=True)
class Wait:
    """For a machine. told: what is asked for, and what is there; "" if all workers have a place.
    is_vain: whether there is no machine for them, and the autoscaler can add none."""

    told: str = ""
    is_vain: bool = False


def wait_of(asked: Mapping[str, float]) -> Wait:
    """How it stands with workers that ask for so much each."""
    status = _status()
    if status is None:
        return Wait()
    state, autoscaler = status.cluster_resource_state, status.autoscaling_state
    if not any(_is(each.request, asked) for each in state.pending_resource_requests):
        return Wait()
    wanted = {name: asked[key] for name, key in RESOURCES.items() if asked[key]}
    machines = [node for node in state.node_states if node.status in ALIVE]
    total = [node.total_resources for node in machines]
    free = [node.available_resources for node in machines]
    there = f"{len(machines)} machine{'' if len(machines) == 1 else 's'}"
    told = "each asks for " + " and ".join(f"{value:g} {name}" for name, value in wanted.items())
    fits = [each for each in total if all(each.get(name, 0.0) >= wanted[name] for name in wanted)]
    if fits:
        left = (f"{_sum(free, name)} of {_sum(total, name)} {name}" for name in wanted)
        told += f"; free are {' and '.join(left)} on {there}"
    else:
        every = (f"{_sum(total, name)} {name}" for name in wanted)
        told += f", which no machine has ({there}, {' and '.join(every)})"
    coming = len(autoscaler.pending_instances)
    coming += sum(each.count for each in autoscaler.pending_instance_requests)
    if coming:
        told += f"; {coming} more to come"
    refused = any(_is(each, asked) for each in autoscaler.infeasible_resource_requests)
    is_vain = refused and not (fits or coming)
    return Wait(told + "; its autoscaler can add none" if is_vain else told, is_vain)


def grows() -> bool:
    """Whether there is an autoscaler that says what it cannot add. Older ones do not."""
    status = _status()
    return status is not None and status.autoscaling_state.autoscaler_state_version > 0


def _status() -> GetClusterStatusReply | None:
    """None where that is not to be known, as of a head that is busy."""
    address = ray.get_runtime_context().gcs_address
    with suppress(grpc.RpcError), init_grpc_channel(address) as channel:
        ask = AutoscalerStateServiceStub(channel).GetClusterStatus
        status: GetClusterStatusReply = ask(GetClusterStatusRequest(), timeout=SECONDS)
        return status
    return None


def _is(request: ResourceRequest, asked: Mapping[str, float]) -> bool:
    """Whether a request is that of an actor that asks for so much. Ray leaves out what is 0."""
    bundle = request.resources_bundle
    return bundle.keys() <= RESOURCES.keys() and all(
        math.isclose(bundle.get(name, 0.0), asked[key], abs_tol=1e-4)
        for name, key in RESOURCES.items()
    )


def _sum(machines: Iterable[Mapping[str, float]], name: str) -> str:
    return f"{sum(each.get(name, 0.0) for each in machines):g}"
