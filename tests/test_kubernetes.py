"""pipelines/kubernetes/, without a cluster: what would be sent is checked against the API's schemas
and KubeRay's fields, and what its containers would run is run, with their user, rights, volumes and
variables (pods.py)."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import images
import pods
import pyarrow.dataset as ds
import pytest
import seams
import yaml
from kustomized import manifests
from later import Later
from PIL import Image

kubernetes_validate = Later("kubernetes_validate")

FOLDER = pods.ROOT / "pipelines" / "kubernetes"
DOCKER = pods.ROOT / "docker"
KUBERAY = json.loads((Path(__file__).parent / "kuberay.json").read_text())
VERSIONS = ("1.33", "1.37")  # the oldest that kustomization.yaml promises, and the newest known
LABELS = {"app.kubernetes.io/name", "app.kubernetes.io/component"}

SENT = {each["kind"]: each for each in manifests(FOLDER)}
BATCH = ("ConfigMap", "Job", "CronJob")


def job_of(kind, sent=SENT):
    spec = sent[kind]["spec"]
    return spec["jobTemplate"]["spec"] if kind == "CronJob" else spec


def cluster_of(kind, sent=SENT):
    spec = sent[kind]["spec"]
    return spec["rayClusterSpec"] if kind == "RayJob" else spec


def templates():
    """Every pod's template, by what it is."""
    yield from ((kind, job_of(kind)["template"]) for kind in ("Job", "CronJob"))
    yield "submitter", SENT["RayJob"]["spec"]["submitterPodTemplate"]
    for kind in ("RayJob", "RayCluster"):
        cluster = cluster_of(kind)
        yield f"{kind} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{kind} {group['groupName']}", group["template"]


TEMPLATES = dict(templates())


def valid(manifest):
    """Raise where a schema says no: of an unknown field, or of a value of another type."""
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def check(kind, value, place):
    """Raise AssertionError where KubeRay has no such field, or one of another type."""
    plain = {"boolean": bool, "integer": int, "number": (int, float), "string": str}
    fields = KUBERAY.get(kind) if isinstance(kind, str) else None
    if fields:
        assert not (unknown := value.keys() - fields), f"{place} has no {unknown}"
        for name, each in value.items():
            check(fields[name], each, f"{place}.{name}")
    elif isinstance(kind, list) and kind[0] in KUBERAY:
        for number, each in enumerate(value):
            check(kind[0], each, f"{place}.{number}")
    elif isinstance(kind, list):
        assert value in kind, f"{place} is one of {kind}"
    elif kind == "strings":
        assert all(type(each) is str for each in value.values()), f"{place} has strings only"
    elif kind == "ObjectMeta":
        valid({"apiVersion": "v1", "kind": "ConfigMap", "metadata": value})
    elif kind == "PodTemplateSpec":
        valid({"apiVersion": "v1", "kind": "PodTemplate", "template": value})
    elif kind == "Container":
        container = {"name": "any", "image": "any", place.rpartition(".")[2]: value}
        valid({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [container]}})
    else:
        assert isinstance(value, plain[kind]), f"{place} is a {kind}"
        assert kind == "boolean" or not isinstance(value, bool), f"{place} is a {kind}"


def test_all_is_as_the_apis_have_it():
    assert SENT.keys() == {*BATCH, "RayCluster", "RayJob"}
    for kind, manifest in SENT.items():
        if kind in BATCH:
            valid(manifest)
        else:
            assert manifest["apiVersion"] == "ray.io/v1"
            check(kind, manifest, kind)


def test_a_field_that_is_not_there_is_noticed():
    broken = manifests(FOLDER)
    for manifest in broken:
        if manifest["kind"] in BATCH[1:]:
            template = job_of(manifest["kind"], {manifest["kind"]: manifest})["template"]
            template["spec"]["containers"][0]["readOnlyRoot"] = True
            with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRoot"):
                valid(manifest)
        elif manifest["kind"] != "ConfigMap":
            cluster = cluster_of(manifest["kind"], {manifest["kind"]: manifest})
            for name, wrong in (("maxReplicas", "4"), ("maxReplica", 4)):
                cluster["workerGroupSpecs"][0] = {"groupName": "gpu", name: wrong}
                with pytest.raises(AssertionError, match="maxReplica"):
                    check(manifest["kind"], manifest, manifest["kind"])


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl to compare with")
def test_kubectl_makes_the_same_of_the_kustomization():
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    assert made == SENT


def test_what_a_site_changes_arrives_where_it_belongs():
    site = {"claim": "theirs", "schedule": "1 1 * * 0", "time-zone": "Europe/Rome",
            "partitions": "3", "gpu-nodes": "7", "ray-workers": "28"}  # fmt: skip
    text = (FOLDER / "kustomization.yaml").read_text()
    assert site.keys() == {
        each.split("=")[0] for each in yaml.safe_load(text)["configMapGenerator"][1]["literals"]
    }
    sent = {each["kind"]: each for each in manifests(FOLDER, site)}
    job, cron = sent["Job"]["spec"], sent["CronJob"]["spec"]
    (partition,) = (
        each["value"]
        for each in job["template"]["spec"]["containers"][0]["env"]
        if each["name"] == "RESFEAT_PARTITION"
    )
    assert (job["completions"], job["parallelism"], partition) == (3, 3, "auto/3")
    assert (cron["schedule"], cron["timeZone"]) == ("1 1 * * 0", "Europe/Rome")
    for kind in ("RayJob", "RayCluster"):
        assert cluster_of(kind, sent)["workerGroupSpecs"][0]["maxReplicas"] == 7
    assert "resfeat-data" not in str(sent) and str(sent).count("'theirs'") == 2 + 2 * 2
    assert str(sent).count("'value': '28'") == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_has_no_rights_that_it_does_not_need(name):
    template = TEMPLATES[name]
    assert template["metadata"]["labels"].keys() >= LABELS
    pod = template["spec"]
    security = pod["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] >= 10000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    # Only the autoscaler, beside a head, has a use for the token of a service account.
    assert pod["automountServiceAccountToken"] is ("head" in name)
    assert pod["enableServiceLinks"] is False
    assert pod["terminationGracePeriodSeconds"] >= 30 if name != "submitter" else True
    for volume in pod["volumes"]:
        assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]
    for container in pod["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        for bounds in ("requests", "limits"):
            assert container["resources"][bounds].keys() >= {"cpu", "memory"}
        # `latest`, and what has no tag, is another image each time.
        assert re.fullmatch(r".+:(cpu|cuda)", container["image"])
    of_the_image = dict(images.steps(DOCKER / "Dockerfile.cpu"))["USER"]
    assert of_the_image == f"{security['runAsUser']}:{security['runAsGroup']}"


def checks(variables):
    """How Ray's head looks whether its machines answer, by what is not left to Ray."""
    found = {name: value for name, value in variables if name.startswith("RAY_health_check_")}
    assert found
    return found


def test_ray_asks_for_the_token_and_is_of_the_version_of_the_images():
    job, cluster = cluster_of("RayJob"), dict(cluster_of("RayCluster"))
    assert cluster.pop("suspend") is True
    assert job == cluster  # as rayjob.yaml says
    assert job["authOptions"] == {"mode": "token", "secretName": "resfeat-ray"}
    pinned = (pods.ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={job['rayVersion']}" in pinned
    own = job["autoscalerOptions"]["securityContext"]
    assert own == job["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContext"]
    (group,) = job["workerGroupSpecs"]
    assert 1 <= group["minReplicas"] < group["maxReplicas"] and job["enableInTreeAutoscaling"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    # What compose.yaml starts gives a lost machine up as soon.
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["head"]
    (head,) = job["headGroupSpec"]["template"]["spec"]["containers"]
    assert checks(compose["environment"].items()) == checks(
        (each["name"], each["value"]) for each in head["env"]
    )
    # No secret is written down here: they are made by the site.
    assert "Secret" not in SENT
    assert not re.search(r"(?i)token: |password", str({**SENT, "RayJob": 0, "RayCluster": 0}))


def test_only_the_schedule_begins_by_itself():
    assert SENT["CronJob"]["spec"].get("suspend", False) is False
    assert SENT["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"
    for kind in ("Job", "RayJob", "RayCluster"):
        assert SENT[kind]["spec"]["suspend"] is True
    # KubeRay takes a suspended job only if its cluster goes with it.
    assert SENT["RayJob"]["spec"]["shutdownAfterJobFinishes"] is True


def action(kind, code):
    """What Kubernetes does when a container has ended so: by the first rule that fits."""
    for rule in job_of(kind)["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("kind", ["Job", "CronJob"])
def test_exit_codes_say_whether_to_try_again(kind):
    job = job_of(kind)
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # else there is no such policy
    (name,) = (each["name"] for each in job["template"]["spec"]["containers"])
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {name}
    assert action(kind, 2) == "FailJob"  # usage
    assert action(kind, 143) == "Ignore"  # SIGTERM
    assert action(kind, 3) == {"Job": "FailIndex", "CronJob": "FailJob"}[kind]  # many failures
    for code in (1, 75, 137):  # failed, busy, out of memory
        assert action(kind, code) == "Count"
    limit = "backoffLimitPerIndex" if kind == "Job" else "backoffLimit"
    assert job[limit] >= 1


QUICK = {"RESFEAT_MODEL": "cifar_resnet20", "RESFEAT_WEIGHTS": "random:0",
         "RESFEAT_RUNTIME": "torch", "RESFEAT_SHARD_SIZE": "2"}  # fmt: skip
# As the Dockerfiles have it: a test of them looks that this is so.
IMAGE = f"""
mkdir -p "$root/opt/resfeat/pipelines"
cp {pods.ROOT}/pipelines/nightly.py "$root/opt/resfeat/pipelines/"
"""
ENTRYPOINT = ["resfeat"]


@pytest.fixture
def data(tmp_path):
    """A volume that many nodes mount, with a few photographs."""
    folder = tmp_path / "data"
    for number in range(8):
        path = folder / "photos" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (30 * number, 60, 90)).save(path)
    return folder


def variables(container, **more):
    """All that a container has: of its image, of the site, and its own. The network is QUICK's, and
    resfeat is that of the tests."""
    site = {**SENT["ConfigMap"]["data"], **QUICK}
    named = [each["configMapRef"]["name"] for each in container.get("envFrom", ())
             if "configMapRef" in each]  # fmt: skip
    assert named in ([], [SENT["ConfigMap"]["metadata"]["name"]])
    own = {each["name"]: each["value"] for each in container["env"]}
    here = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "PYTHONPATH": str(pods.ROOT)}
    image = images.variables(DOCKER / f"Dockerfile.{container['image'].rpartition(':')[2]}")
    return {**image, **here, **(site if named else {}), **own, **more}


def words(container, environment):
    """The command line of a container. $(NAME) is Kubernetes' way to write a variable."""
    given = [*container.get("command", ENTRYPOINT), *container.get("args", ())]
    return [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], each) for each in given]


def begin(template, data, *, within=(), also="", **more):
    """The first container of a pod, begun. also: what else is to be put into its root."""
    pod = template["spec"]
    environment = variables(pod["containers"][0], **more)
    line = words(pod["containers"][0], environment)
    claims = {"resfeat-data": data}
    return pods.container(pod, line, environment, claims, image=IMAGE + also, within=within)


def rows(data):
    return ds.dataset(data / "embeddings" / "embeddings", format="parquet").to_table()


def test_a_share_of_the_indexed_job(data):
    """The second pod, alone: it makes the plan, and does every second shard."""
    sent = {each["kind"]: each for each in manifests(FOLDER, {"partitions": "2"})}
    with begin(job_of("Job", sent)["template"], data, JOB_COMPLETION_INDEX="1") as pod:
        code, told = pod.wait()
    assert code == 0, told
    report = json.loads(told.splitlines()[-1])
    assert report["options"]["partition"] == {"value": "auto/2", "from": "environment"}
    assert rows(data)["id"].to_pylist() == ["2.png", "3.png", "6.png", "7.png"]
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (data / "embeddings").rglob("*")}
    assert owners == {(10001, 10001)}


@pytest.mark.more
def test_a_pod_that_is_preempted_drains_and_its_successor_goes_on(data):
    """SIGTERM to process 1, and nothing after it."""
    sent = {each["kind"]: each for each in manifests(FOLDER, {"partitions": "1"})}
    template = job_of("Job", sent)["template"]
    for number in range(8, 40):
        shutil.copy(data / "photos" / "0.png", data / "photos" / f"{number}.png")
    slow = {"resfeat.decoding.decode": seams.UNHURRIED.replace("0.01", "0.5")}
    hook = seams.after_import(slow, data / "hook")["PYTHONPATH"]
    parts = data / "embeddings" / "embeddings"
    with begin(template, data, JOB_COMPLETION_INDEX="0", PYTHONPATH=f"{hook}:{pods.ROOT}") as pod:
        while pod.poll() is None and not (parts.exists() and any(parts.iterdir())):
            time.sleep(0.1)
        pod.send_signal(signal.SIGTERM)
        code, told = pod.wait(template["spec"]["terminationGracePeriodSeconds"])
    assert code == 143 and action("Job", code) == "Ignore", told
    assert 0 < len(rows(data)) < 40
    with begin(template, data, JOB_COMPLETION_INDEX="0") as pod:
        code, told = pod.wait()
    assert code == 0, told
    assert len(rows(data)) == 40


@pytest.mark.more
def test_a_night(data):
    with begin(job_of("CronJob")["template"], data) as pod:
        code, told = pod.wait()
    assert code == 0, told
    assert len(rows(data)) == 8
    assert list((data / "embeddings" / "_resfeat" / "runs").iterdir())


@pytest.mark.more
def test_a_job_that_asks_for_what_there_is_not_is_not_tried_again(data):
    with begin(job_of("Job")["template"], data, RESFEAT_MODEL="resnet5O") as pod:
        code, told = pod.wait()
    assert code == 2 and action("Job", code) == "FailJob", told
