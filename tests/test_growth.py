"""What is told of workers that wait for a machine: a cluster's own words, as messages of Ray's.
`integration/test_autoscaling.py` asks a real one."""

from types import SimpleNamespace

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply, NodeStatus

from resfeat.engines import growth
from resfeat.engines.ray import VAIN_SECONDS, RayEngine
from resfeat.errors import ResfeatError

ASKED = {"num_cpus": 3.0, "num_gpus": 0.3333}
OURS = {"CPU": 3.0, "GPU": 0.3333}


def reply(machines=(), waiting=(OURS,), refused=(), pending=0):
    """machines: what each has in all, and what of it is free."""
    told = GetClusterStatusReply()
    state, autoscaler = told.cluster_resource_state, told.autoscaling_state
    for total, free in machines:
        state.node_states.add(total_resources=total, available_resources=free, status="IDLE")
    gone = state.node_states.add(total_resources={"CPU": 64, "GPU": 8})
    gone.status = NodeStatus.DEAD
    for bundle in waiting:
        state.pending_resource_requests.add(count=2).request.resources_bundle.update(bundle)
    for bundle in refused:
        autoscaler.infeasible_resource_requests.add().resources_bundle.update(bundle)
    if pending:
        autoscaler.pending_instance_requests.add(count=pending - 1)
        autoscaler.pending_instances.add()
    return told


SMALL = ({"CPU": 4.0}, {"CPU": 4.0})
LARGE = ({"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 0.5})
NONE_HAS = "each asks for 3 CPU and 0.3333 GPU, which no machine has (1 machine, 4 CPU and 0 GPU)"
FREE = "each asks for 3 CPU and 0.3333 GPU; free are 6 of 12 CPU and 0.5 of 1 GPU on 2 machines"


@pytest.mark.parametrize(
    ("told", "text", "is_vain"),
    [
        (reply([SMALL]), NONE_HAS, False),
        (reply([SMALL], refused=[OURS]), f"{NONE_HAS}; its autoscaler can add none", True),
        (reply([SMALL], refused=[{"CPU": 5.0}]), NONE_HAS, False),
        # One of those that are to come may be for some of us, whatever is said of the others.
        (reply([SMALL], refused=[OURS], pending=3), f"{NONE_HAS}; 3 more to come", False),
        # Others have what fits, until they end.
        (reply([SMALL, LARGE], refused=[OURS]), FREE, False),
        # All have a place, and start; somebody else waits.
        (reply([LARGE], waiting=[{"CPU": 3.0}, {**OURS, "disk": 1}], refused=[OURS]), "", False),
        (None, "", False),
    ],
)  # fmt: skip
def test_what_there_is_and_what_is_wanted(told, text, is_vain, monkeypatch):
    monkeypatch.setattr(growth, "_status", lambda: told)
    assert growth.wait_of(ASKED) == growth.Wait(text, is_vain)


@pytest.mark.parametrize("version", [0, 1, None])
def test_an_autoscaler_is_there_if_one_reports(version, monkeypatch):
    told = None if version is None else reply()
    if told:
        told.autoscaling_state.autoscaler_state_version = version
    monkeypatch.setattr(growth, "_status", lambda: told)
    assert growth.grows() is bool(version)


def test_a_wait_ends_where_the_cluster_says_for_long_that_it_is_vain(monkeypatch):
    """From when it began to say so, the last time."""
    engine = SimpleNamespace(_resources=ASKED, _vain_since=None)

    def why(waited, is_vain):
        monkeypatch.setattr(growth, "wait_of", lambda asked: growth.Wait("none has it", is_vain))
        return RayEngine._why(engine, waited)

    assert why(0.0, is_vain=True) == ": none has it"
    why(VAIN_SECONDS, is_vain=False)
    for waited in (VAIN_SECONDS + 1, 2 * VAIN_SECONDS):
        assert why(waited, is_vain=True) == ": none has it"
    with pytest.raises(ResfeatError, match=r"no machine came for a worker within 602 s: none has"):
        why(2 * VAIN_SECONDS + 2, is_vain=True)
