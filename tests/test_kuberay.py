"""The containers of pipelines/kubernetes/rayjob.yaml, run: head, worker and submitter, each with a
network, a root, rights and volumes of its own (pods.py), as KubeRay starts them (kuberay.py). The
cluster of raycluster.yaml is the same, word for word, which test_kubernetes.py compares."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager

import kuberay
import pytest
from kustomized import manifests
from machines import machines, why_none
from small import write_pictures
from test_kubernetes import FOLDER, begin, rows

pytestmark = [pytest.mark.more, pytest.mark.ray]

COUNT = 8
LIMIT = 300  # seconds, for whatever is waited for
TOKEN, ANOTHER = "0" * 32, "1" * 32
GET = "import sys; from urllib.request import urlopen; urlopen(sys.argv[1], timeout=5)"


class Pods:
    """Pods that see each other and one volume, and their head by the name of its Service."""

    def __init__(self, made, data):
        self._made, self._data = made, data
        self._addresses = {name: made.add(name) for name in ("head", "worker", "submitter")}
        for name in self._addresses:  # Ray takes the address of the way out for its own
            out = ["ip", "route", "add", "default", "dev", "cable"]
            subprocess.run([*made.within(name), *out], check=True)

    @contextmanager
    def ready(self, name, template, **more):
        """A pod, as long as the block lasts, from when it is ready. On a busy machine Ray gives up
        after 30 s; the kubelet, too, begins again."""
        for _ in range(3):
            with self._begin(name, template, **more) as pod:
                if self._becomes_ready(name, template, pod):
                    yield
                    return
                told = pod.wait(LIMIT)[1]
        raise AssertionError(told)

    def run(self, name, template):
        """The exit code of a pod that ends by itself, and what it wrote."""
        with self._begin(name, template) as pod:
            return pod.wait(LIMIT)

    def _begin(self, name, template, **more):
        hosts = f'echo "{self._addresses["head"]} {kuberay.HEAD}" >> "$root/etc/hosts"\n'
        hosts += ': > "$root/etc/resolv.conf"\n'  # there is nobody else to be asked for names
        within = self._made.within(name)
        return begin(template, self._data, within=within, also=hosts, **more)

    def _becomes_ready(self, name, template, pod):
        """Whether both probes succeed, asked at the pod's address as the kubelet does, before the
        pod ends."""
        container = template["spec"]["containers"][0]
        asked = [container[probe]["httpGet"] for probe in ("readinessProbe", "livenessProbe")]
        left = [f"http://{self._addresses[name]}:{each['port']}{each['path']}" for each in asked]
        deadline = time.monotonic() + LIMIT
        while left and pod.poll() is None:
            assert time.monotonic() < deadline, left
            words = [*self._made.within(name), sys.executable, "-c", GET, left[0]]
            if subprocess.run(words, capture_output=True).returncode:
                time.sleep(0.5)
            else:
                left.pop(0)
        while pod.poll() is None and not pod.sees("/tmp/ray/ray_current_cluster"):
            time.sleep(0.1)  # `ray start` may still give up, where the machine is busy
        return pod.poll() is None


@pytest.fixture
def data(tmp_path):
    write_pictures(tmp_path / "data" / "photos", COUNT)
    return tmp_path / "data"


@pytest.fixture
def nodes(data):
    if why := why_none():
        pytest.skip(why)
    with machines() as made:
        yield Pods(made, data)


def test_a_job_on_a_cluster_of_its_own(nodes, data):
    """As in the manifests but for a small network (QUICK), a site that wants one worker, and, since
    there is no GPU, workers that ask for none."""
    site = {"ray-workers": "1"}
    (job,) = (each["spec"] for each in manifests(FOLDER, site) if each["kind"] == "RayJob")
    cluster = job["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    head, worker = kuberay.head(cluster, TOKEN), kuberay.worker(group, TOKEN)
    with nodes.ready("head", head, RESFEAT_GPUS_PER_WORKER="0"):
        code, told = nodes.run("worker", kuberay.waits_for_the_head(group, TOKEN))
        assert code == 0, told
        with nodes.ready("worker", worker):
            code, told = nodes.run("submitter", kuberay.submitter(job, ANOTHER, "stranger"))
            assert code != 0 and "token" in told, told
            code, told = nodes.run("submitter", kuberay.submitter(job, TOKEN, "ours"))
            assert code == 0, told
    assert len(rows(data)) == COUNT
    (report,) = (data / "embeddings" / "_resfeat" / "runs").iterdir()
    report = json.loads(report.read_text())
    assert (report["engine"]["engine"], report["engine"]["address"]) == ("ray", "auto")
    for option, value in {"address": "auto", "workers": 1, "model": "cifar_resnet20"}.items():
        assert report["options"][option] == {"value": value, "from": "environment"}
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (data / "embeddings").rglob("*")}
    assert owners == {(10001, 10001)}
