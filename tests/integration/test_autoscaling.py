"""A Ray that has room for drivers alone until its autoscaler adds machines: Ray's own autoscaler,
with the provider that Ray has for tests, in a network namespace."""

import json
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from integration.test_faults import last_report
from integration.test_namespaces import end_of
from machines import machines, why_none
from seams import after_import
from small import QUICK
from tables import rows

import resfeat
from resfeat.dataset import Layout

pytestmark = [pytest.mark.more, pytest.mark.ray]

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD = "f" * 51 + "00000"  # by this the provider knows the machine that it has not made
FAKE = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    "RAY_CLOUD_INSTANCE_ID": HEAD,
    "RAY_enable_autoscaler_v2": "1",  # as KubeRay with autoscalerOptions.version: v2
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
# What the autoscaler looks up, and has no default for.
UNUSED = [
    "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
]  # fmt: skip
MOST = 2  # machines of one core
PORT = 6379


def asked_of_the_autoscaler(address):
    return {
        **{key: [] for key in UNUSED},
        "file_mounts": {},
        "docker": {},
        "auth": {},
        "cluster_name": "grown",
        "max_workers": MOST,
        "upscaling_speed": 1,
        "idle_timeout_minutes": 60,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "head_node_id": HEAD,
            "gcs_address": f"{address}:{PORT}",
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "max_workers": MOST,
            },
        },
    }


class Grown:
    """It, and drivers on its head."""

    def __init__(self, made, folder):
        self.made, self.folder = made, folder
        self.address = made.add("head")
        hook = after_import({"resfeat.engines.ray": "VAIN_SECONDS = 10.0"}, folder / "hook")
        ours = str(Path(resfeat.__file__).parents[1])
        self.env = {
            **hook,
            "PYTHONPATH": os.pathsep.join([hook["PYTHONPATH"], ours]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        }

    def start(self):
        config = self.folder / "autoscaler.json"
        config.write_text(json.dumps(asked_of_the_autoscaler(self.address)))
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head",
                 f"--node-ip-address={self.address}", f"--port={PORT}", "--num-cpus=0",
                 f"--temp-dir={self.folder / 'ray'}", "--object-store-memory=80000000",
                 "--include-dashboard=false", "--disable-usage-stats",
                 f"--autoscaling-config={config}"]  # fmt: skip
        for _ in range(3):  # on a busy machine Ray gives up after 30 s
            with open(self.folder / "head.log", "w+") as log:
                process = self.made.start("head", words, self.env | FAKE, log)
                process.log = log
                told = end_of(process)
            if not process.returncode:
                return
            self.stop()
        raise AssertionError(told)

    def drive(self, *words):
        """The exit code of the command, and what it told."""
        words = [sys.executable, "-m", "resfeat", *words, "--address", f"{self.address}:{PORT}"]
        with open(self.folder / "driver.log", "w+") as log:
            process = self.made.start("head", words, self.env, log)
            process.log = log
            told = end_of(process)
        return process.returncode, told

    def stop(self):
        for pid in self.made.pids("head"):
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()


@pytest.fixture(scope="module")
def grown():
    if why := why_none():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # the paths of Ray's sockets have to be short
    with machines() as made:
        ray = Grown(made, folder)
        try:
            ray.start()
            yield ray
        finally:
            ray.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Ray has workers import from where the driver stands: not where this resfeat is."""
    monkeypatch.chdir(tmp_path)


def error_in(told):
    (line,) = (line for line in told.splitlines() if line.startswith("Error"))
    assert "Traceback" not in told
    return line


def test_machines_are_added_for_workers_and_what_none_will_have_is_refused(
    grown, some, serial, tmp_path
):
    output = tmp_path / "out"
    words = "extract", some, "-o", output, *QUICK
    # Without a machine: what none will ever have; without a word on what is needed; and what fits,
    # for more workers than there will be machines.
    code, told = grown.drive(*words, "--workers", 2, "--cpus-per-worker", 4)
    vain = (
        "each asks for 4 CPU, which no machine has (1 machine, 0 CPU); its autoscaler can add none"
    )
    assert code == 1 and f" s: {vain}; give less --cpus-per-worker" in error_in(told)
    assert f" s so far: {vain}" in told
    code, told = grown.drive(*words)
    assert code == 1 and "give --workers and --cpus-per-worker" in error_in(told)
    assert not Layout(output).committed()
    code, told = grown.drive(*words, "--workers", MOST + 1, "--cpus-per-worker", 1)
    assert code == 0, told
    assert f"waiting for the first of {MOST + 1} workers" in told  # why: see test_growth.py
    assert rows(output).equals(rows(serial))
    engine = last_report(output)["engine"]
    assert engine["workers"] == MOST + 1 and engine["worker_deaths"] == 0
    # With machines that are too small.
    words = "extract", some, "-o", tmp_path / "other", *QUICK
    code, told = grown.drive(*words, "--workers", 2, "--cpus-per-worker", 4)
    assert code == 1 and f"which no machine has ({MOST + 1} machines, {MOST} CPU)" in error_in(told)
