"""Joining and starting Ray: what is said when it cannot be, and what the caller's process keeps."""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray
from command import end_ray

from resfeat.engines import alone, cluster, reach
from resfeat.engines.cluster import Cluster
from resfeat.errors import ResfeatError, UsageError

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def no_ray():
    """Other tests of this process share one."""
    end_ray()


def test_an_ipv6_address_in_brackets():
    with socket.socket(socket.AF_INET6) as server:
        try:
            server.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        server.listen()
        port = server.getsockname()[1]
        # It is reached, and then told apart from what Ray would take it for.
        with pytest.raises(ConnectionError, match="it listens on loopback"):
            reach.reach(f"[::1]:{port}", 1)
    with pytest.raises(ConnectionRefusedError):
        reach.reach(f"[::1]:{port}", 1)


class Refusing(grpc.GenericRpcHandler):
    """Answers whatever it is asked with a code, as a cluster does that wants a token."""

    def __init__(self, code):
        self.code = code

    def service(self, details):
        def refuse(asked, context):
            context.abort(self.code, "and why")

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "it wants a token: set RAY_AUTH_MODE=token, and RAY_AUT"),
        (grpc.StatusCode.UNIMPLEMENTED, "it is no head of a Ray (and why): check --address"),
    ],
)
def test_a_cluster_that_refuses(code, told):
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refusing(code)])
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    ours = Cluster(f"127.0.0.1:{port}", lambda text: None)
    try:
        with pytest.raises(ResfeatError) as raised:
            ours.ready()
    finally:
        ours.close()
        server.stop(0)
    assert str(raised.value).startswith(f"cannot join Ray at 127.0.0.1:{port}: {told}")


@pytest.mark.parametrize("address", ["there", "local"])
def test_an_address_without_a_port(address):
    with pytest.raises(ResfeatError, match="it has no port: give HOST:PORT"):
        reach.reach(address, 1)


@pytest.mark.parametrize("asked", ["ray://me:planted@head:10001", "auto"])
def test_ray_client_is_refused_before_anything_is_done(asked, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:planted@head:10001")
    with pytest.raises(UsageError) as told:
        Cluster(asked, lambda text: None)
    assert str(told.value).startswith("ray://head:10001 is an address of Ray Client, which resfeat")
    assert str(told.value).endswith(
        "--address HOST:PORT, or submit the command with `ray job submit`"
    )
    Cluster(None, lambda text: None).close()  # one of our own


def test_one_that_accepts_and_never_answers():
    silent = socket.create_server(("0.0.0.0", 0))
    with silent, pytest.raises(ResfeatError, match="no answer within 1 s"):
        reach.reach(f"127.0.0.1:{silent.getsockname()[1]}", 1)


def test_rays_start_time_out_is_one_line_with_the_next_step(monkeypatch):
    def times_out(**options):
        raise Exception(
            "The current node timed out during startup. This could happen because some of the "
            "raylet failed to startup or the GCS has become overloaded."
        )

    monkeypatch.setattr(ray, "init", times_out)
    ours = Cluster(None, lambda text: None)
    try:
        with pytest.raises(ResfeatError) as told:
            ours.ready()
    finally:
        ours.close()
    (line,) = str(told.value).splitlines()
    assert line.startswith("cannot start Ray: The current node timed out during startup.")
    assert line.endswith("or give --workers 0")


def test_the_user_is_told_that_ray_is_starting(monkeypatch):
    told, go_on = [], threading.Event()
    monkeypatch.setattr(ray, "init", lambda **options: go_on.wait(60))
    monkeypatch.setattr(cluster, "UNDER_WAY_SECONDS", 0)  # no process is started
    for address, step in ((None, "starting Ray"), ("auto", "joining Ray at auto")):
        monkeypatch.setattr(cluster, "address_of", lambda asked: None)
        ours = Cluster(address, told.append)
        go_on.clear()
        ours.begin()
        assert told == []
        threading.Timer(0.2, go_on.set).start()
        ours.ready()
        ours.ready()
        assert told == [step]
        told.clear()
        ours.close()


# In a process of its own, since Ray reads some variables when it is imported.
ENVIRONMENT = """
import json, os

def changed():
    now = dict(os.environ)
    return sorted(name for name in before.keys() | now if before.get(name) != now.get(name))

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "caller's"
before = dict(os.environ)
import resfeat.cli
from resfeat.engines.cluster import Cluster
told = [changed()]
ours = Cluster(None, lambda text: None)
ours.ready()
told.append(changed())
ours.close()
told.append(changed())
print(json.dumps(told))
"""


def test_the_environment_is_given_back():
    bare = {name: value for name, value in os.environ.items() if name not in cluster.SWITCHES}
    command = [sys.executable, "-c", ENVIRONMENT]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported, running, after = json.loads(done.stdout)
    assert imported == after == []
    for switch in cluster.SWITCHES.keys() | alone.ENVIRONMENT:
        assert switch in running


# In a process of its own, since that has other Rays' processes below it. Prints what Ray runs here,
# what its workers have, whether it was there when `begin` returned, and what was not given back.
STARTED = """
import json, pathlib, time
import psutil
from ray._private import parameter, ray_constants, services, utils
from resfeat.engines import cluster
from resfeat.engines.cluster import Cluster

def theirs():
    return {name: value for module in (parameter, ray_constants, services, utils)
            for name, value in vars(module).items() if callable(value) or isinstance(value, bool)}

def has(process):
    maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
    return [name for name in ("libtorch_cpu", "/pandas/") if name in maps]

before = theirs()
cluster.UNDER_WAY_SECONDS = 60  # whatever else runs here
ours = Cluster(None, lambda text: None, workers=1)
ours.begin()
begun = "raylet" in [each.name() for each in psutil.Process().children(recursive=True)]
ours.ready()
for _ in range(600):
    time.sleep(0.1)
    try:
        below = psutil.Process().children(recursive=True)
        workers = [each for each in below if "ray::" in each.name() and "Agent" not in each.name()]
        told = [" ".join(each.cmdline()) for each in below], list(map(has, workers)), begun
    except (OSError, psutil.Error):  # one has just ended
        continue
    if workers and all(told[1]):
        break
ours.close()
after = theirs()
print(json.dumps([*told, [name for name in before if after[name] is not before[name]]]))
"""


def test_a_ray_of_our_own_is_only_what_a_run_needs(tmp_path):
    """No dashboard, no monitors, and a process for a worker, which imports torch in advance."""
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    running, have, begun, changed = json.loads(done.stdout)
    assert any("--num_prestart_python_workers=1 " in each for each in running)
    assert have == [["libtorch_cpu"]] and begun
    assert not any("dashboard.py" in each or "monitor.py" in each for each in running)
    assert changed == []


@pytest.mark.parametrize(
    ("module", "name"), [("services", "get_node"), ("services", None), ("parameter", "RayParams")]
)
def test_a_ray_that_has_other_functions_starts_as_it_would(module, name, monkeypatch):
    module = importlib.import_module(f"ray._private.{module}")
    if name is None:
        monkeypatch.setitem(sys.modules, module.__name__, None)  # it cannot be imported
        monkeypatch.delattr(ray._private, "services")
    elif name == "RayParams":
        monkeypatch.setattr(module, name, lambda node_ip_address: None)
    else:
        monkeypatch.delattr(module, name)
    before, told = dict(vars(module)), []
    with alone.only_what_a_run_needs(None, lambda: told.append("under way")):
        assert dict(vars(module)) == before
        assert told  # nobody would say so later


@pytest.mark.parametrize(
    ("workers", "cores", "ready"), [(None, 2, 1), (None, 64, 8), (3, 64, 3), (16, 2, 2)]
)
def test_a_process_is_ready_for_each_worker_and_no_more_than_cores(
    workers, cores, ready, monkeypatch
):
    monkeypatch.setattr(alone, "cpu_count", lambda: cores)
    started = []
    monkeypatch.setattr("ray._private.services.start_ray_process", started.append)
    with alone.only_what_a_run_needs(workers, lambda: started.append("under way")):
        ray._private.services.start_ray_process(["gcs_server"])
        ray._private.services.start_ray_process(["raylet", "--num_prestart_python_workers=64"])
    raylet = ["raylet", f"--num_prestart_python_workers={ready}"]
    assert started == [["gcs_server"], raylet, "under way"]


def test_joining_a_cluster_is_waited_for_only_when_it_is_needed(monkeypatch):
    joined, may_answer = [], threading.Event()

    def answers(there, seconds):
        may_answer.wait(5)
        joined.append(there)
        raise ConnectionRefusedError

    monkeypatch.setattr(cluster, "UNDER_WAY_SECONDS", 30)
    monkeypatch.setattr(reach, "reach", answers)
    ours = Cluster("127.0.0.1:1", lambda text: None)
    try:
        ours.begin()
        assert not joined
        may_answer.set()
        with pytest.raises(ResfeatError, match="cannot join Ray at"):
            ours.ready()
    finally:
        ours.close()
    assert joined == ["127.0.0.1:1"]


def test_nothing_is_preloaded_beside_a_torch_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert alone.PRELOADED.items() <= alone.environment().items()
    (tmp_path / "torch.py").touch()
    assert alone.environment() == alone.ENVIRONMENT


def test_what_is_preloaded_may_fail(tmp_path):
    """Ray would end the process, and start another one for ever."""
    (tmp_path / "torch.py").write_text("raise OSError('cannot allocate memory')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import resfeat.engines.preloaded"]
    assert subprocess.run(command, cwd=tmp_path, env=env).returncode == 0


def test_a_node_that_cannot_be_looked_for_is_asked_for_as_ray_does(monkeypatch):
    def client(address):
        raise RuntimeError(f"{address} does not answer")

    monkeypatch.setattr("ray._raylet.GcsClient", client)
    asked = []
    given = alone._found(lambda *which: asked.append(which) or "node", "127.0.0.1:1", "ab")
    assert given == "node" and asked == [("127.0.0.1:1", "ab")]
