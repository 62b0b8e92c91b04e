"""How many workers there are and what each gets, on invented machines. `integration/test_ray.py`
asks a real Ray."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resfeat.backbones.ours import IMAGENET
from resfeat.engines import placement
from resfeat.errors import ResfeatError
from resfeat.spec import Identity, RuntimeOptions

TO_COME = {"workers": 6, "cpus_per_worker": 3, "address": "auto"}
IDENTITY = Identity(model="resnet18", weights_digest="", preprocessing=IMAGENET)


def place(machines, shards=1000, address=None, **options):
    """machines: CPU cores and GPUs of each."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}
        for cpus, gpus in machines
    ]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(placement.ray, "nodes", lambda: nodes)
        given = placement.place(RuntimeOptions(address=address, **options), IDENTITY, shards)
    workers, asked, placed = given
    assert placed.gpus == asked["num_gpus"]
    return workers, asked["num_gpus"], asked["num_cpus"], placed.cpus


@pytest.mark.parametrize(
    ("machines", "options", "given"),
    [
        # Two cores to a worker, and at most eight workers.
        ([(16, 1)], {}, (8, 0.125, 2.0, 2)),
        ([(64, 1)], {}, (8, 0.125, 8.0, 8)),
        ([(8, 1)], {}, (4, 0.25, 2.0, 2)),
        ([(7, 1)], {}, (3, 0.3333, 2.0, 2)),
        ([(2, 1)], {}, (1, 1.0, 2.0, 2)),
        ([(1, 1)], {}, (1, 1.0, 1.0, 1)),
        ([(4, 8)], {}, (8, 1.0, 0.5, 1)),
        ([(16, 2)], {}, (8, 0.25, 2.0, 2)),
        # No more workers than shards: they have more of the GPU, and of the cores.
        ([(16, 1)], {"shards": 3}, (3, 0.3333, 5.0, 5)),
        ([(16, 2)], {"shards": 1}, (1, 1.0, 16.0, 16)),
        # What the user says decides.
        ([(16, 1)], {"gpus_per_worker": 1}, (1, 1.0, 16.0, 16)),
        ([(16, 1)], {"gpus_per_worker": 0.1}, (10, 0.1, 1.0, 1)),
        ([(16, 3)], {"gpus_per_worker": 0.33}, (9, 0.33, 1.0, 1)),
        ([(16, 1)], {"workers": 4}, (4, 0.25, 4.0, 4)),
        ([(16, 2)], {"workers": 1}, (1, 1.0, 16.0, 16)),
        ([(16, 1)], {"cpus_per_worker": 4}, (4, 0.25, 4.0, 4)),
        ([(16, 1)], {"gpus_per_worker": 0}, (2, 0.0, 8.0, 8)),
        # Where there are GPUs, only machines with one count, and the poorest of them decides.
        ([(4, 0), (16, 1)], {}, (8, 0.125, 2.0, 2)),
        ([(64, 0), (16, 1), (8, 1)], {}, (8, 0.25, 2.0, 2)),
        ([(64, 0), (16, 1)], {"gpus_per_worker": 1}, (1, 1.0, 16.0, 16)),
        # More than there is room for wait for an autoscaler.
        ([(16, 1)], {"workers": 20, "address": "auto"}, (20, 0.125, 2.0, 2)),
        ([(16, 1)], {"workers": 4, "gpus_per_worker": 1, "address": "auto"}, (4, 1.0, 16.0, 16)),
        ([(2, 0)], {"workers": 4, "address": "auto"}, (4, 0.0, 1.0, 1)),
        ([(2, 0)], {"workers": 4}, (4, 0.0, 0.5, 1)),
        # So do all of them where no machine is there yet, if it is said what each asks for.
        ([], {**TO_COME, "gpus_per_worker": 0.5}, (6, 0.5, 3.0, 3)),
        ([(0, 0)], TO_COME, (6, 0.0, 3.0, 3)),
        ([(8, 0)], {**TO_COME, "gpus_per_worker": 1, "shards": 2}, (2, 1.0, 3.0, 3)),
    ],
)  # fmt: skip
def test_workers_and_what_each_gets(machines, options, given):
    assert place(machines, **options) == given


@pytest.mark.parametrize(
    ("machines", "options", "says"),
    [
        ([(16, 0)], {"gpus_per_worker": 0.5}, "GPU was asked for .* and Ray sees none"),
        ([(16, 1)], {"workers": 9}, "9 workers of 0.125 GPU are more than the 1 here: give fewer"),
        ([(16, 1)], {"workers": 3, "gpus_per_worker": 0.5}, "3 workers of 0.5 GPU are more"),
        ([(16, 1), (32, 0)], {"cpus_per_worker": 20}, r"any machine has \(16\): give less"),
        ([(0, 1)], {}, "no CPU yet"),
        ([(0, 0)], {"workers": 6, "address": "auto"}, "give --workers and --cpus-per-worker"),
        ([(8, 0)], {"gpus_per_worker": 1, "address": "auto"}, "give --workers and --cpus-per-w"),
    ],
)  # fmt: skip
def test_what_there_is_no_room_for(machines, options, says):
    with pytest.raises(ResfeatError, match=says):
        place(machines, **options)


def test_more_cores_than_any_machine_has_are_for_machines_to_come_where_some_may(monkeypatch):
    from resfeat.engines import growth

    monkeypatch.setattr(growth, "grows", lambda: True)
    assert place([(2, 0)], **TO_COME) == (6, 0.0, 3.0, 3)
    monkeypatch.setattr(growth, "grows", lambda: False)
    with pytest.raises(ResfeatError, match=r"any machine has \(2\): give less"):
        place([(2, 0)], **TO_COME)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=4),
    st.integers(1, 200),
    st.sampled_from([None, 0.1, 0.25, 0.5, 1]),
)
def test_all_workers_find_room_at_once(machines, shards, share):
    """By default nobody waits, and no more share a GPU than may."""
    gpus = sum(gpus for _, gpus in machines)
    asked_for = share if gpus else None
    workers, each, cores, _ = place(machines, shards, gpus_per_worker=asked_for)
    assert 1 <= workers <= shards
    if not gpus:
        return
    on_one = 10_000 // round(each * 10_000)  # as Ray counts
    assert share or on_one <= 8
    room = [min(has * on_one, int(cpus / cores + 1e-9)) for cpus, has in machines if has]
    assert sum(room) >= workers
