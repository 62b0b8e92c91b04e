"""What KubeRay's operator adds to the pods of a RayJob. The operator is not run here; this imitates
its commands, variables and volume for logs, as pod.go, job.go and rayjob_controller.go of
`ray-operator/controllers/ray/` make them in KubeRay 1.6 and 1.7. The autoscaler's container is left
out, and so is all that the operator does once the pods run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Template = dict[str, Any]

# The Service that the operator makes for a head. RayJob names its cluster by chance.
CLUSTER = "resfeat-7xk2p"
HEAD = f"{CLUSTER}-head-svc.resfeat.svc.cluster.local"
PORT, DASHBOARD = 6379, f"http://{HEAD}:8265"
SHELL = ["/bin/bash", "-c", "--"]


def head(cluster: Mapping[str, Any], token: str) -> Template:
    """The pod of a cluster's head."""
    group = cluster["headGroupSpec"]
    own = {"no-monitor": "true"} if cluster["enableInTreeAutoscaling"] else {}
    command = _ray_start("ray start --head", group, own)
    template = _with(
        group["template"],
        [*SHELL, f"ulimit -n 65536; {command}"],
        RAY_ADDRESS=f"127.0.0.1:{PORT}",
        RAY_USAGE_STATS_EXTRA_TAGS="kuberay_version=v1.6.0;kuberay_crd=RayJob",
        **_of_a_node(command, "headgroup", token),
    )
    # For what the autoscaler writes, which the head reads.
    template["spec"]["volumes"].append({"name": "ray-logs", "emptyDir": {}})
    mounts = template["spec"]["containers"][0]["volumeMounts"]
    mounts.append({"name": "ray-logs", "mountPath": "/tmp/ray"})
    return template


def worker(group: Mapping[str, Any], token: str) -> Template:
    """The pod of one of a cluster's workers."""
    command = _ray_start("ray start", group, {"address": f"{HEAD}:{PORT}"})
    return _with(
        group["template"],
        [*SHELL, f"ulimit -n 65536; {command}"],
        FQ_RAY_IP=HEAD,
        RAY_IP=HEAD.partition(".")[0],
        RAY_ADDRESS=f"{HEAD}:{PORT}",
        **_of_a_node(command, group["groupName"], token),
    )


def waits_for_the_head(group: Mapping[str, Any], token: str) -> Template:
    """The same pod before its worker begins: an init container, which gets the worker's `env` and
    mounts, but not what comes by `envFrom`."""
    template = _with(
        group["template"],
        [*SHELL, f"until ray health-check --address {HEAD}:{PORT} ; do sleep 5 ; done"],
        FQ_RAY_IP=HEAD,
        RAY_IP=HEAD.partition(".")[0],
        **_token(token),
    )
    del template["spec"]["containers"][0]["envFrom"]
    return template


def submitter(job: Mapping[str, Any], token: str, name: str) -> Template:
    """The pod that submits a job of this name, or follows it where that was done before."""
    ask = "import urllib.request as u; exit(b'success' not in u.urlopen('{}').read())"
    asks = f'python -c "{ask.format(DASHBOARD + "/api/gcs_healthz")}"'
    script = (
        f"until {asks} >/dev/null 2>&1 ; do sleep 2 ; done ; "
        f"if ! ray job status --address {DASHBOARD} {name} >/dev/null 2>&1 ; "
        f"then ray job submit --address {DASHBOARD} --no-wait --submission-id {name} "
        f"-- {job['entrypoint'].strip()} ; fi ; "
        f"ray job logs --address {DASHBOARD} --follow {name}"
    )
    return _with(
        job["submitterPodTemplate"],
        ["/bin/bash", "-ce", "--", script],
        PYTHONUNBUFFERED="1",
        RAY_DASHBOARD_ADDRESS=DASHBOARD.removeprefix("http://"),
        RAY_JOB_SUBMISSION_ID=name,
        **_token(token),
    )


def _ray_start(start: str, group: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """`ray start` by what the container's limits say, the operator's own and the manifest's
    parameters, of which the last count most. `block` is not the manifest's to choose."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    given = {
        "num-cpus": limits["cpu"],
        "memory": str(int(limits["memory"].removesuffix("Gi")) << 30),
        **({"num-gpus": str(limits["nvidia.com/gpu"])} if "nvidia.com/gpu" in limits else {}),
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
        **own,
        **group["rayStartParams"],
        "block": "true",
    }
    words = (
        f"--{name}" if value == "true" else f"--{name}={value}"
        for name, value in sorted(given.items())
        if value != "false"
    )
    return f"{start} {' '.join(words)}"


def _of_a_node(command: str, group: str, token: str) -> dict[str, str]:
    """The variables that a head and a worker have alike."""
    return {
        "RAY_CLUSTER_NAME": CLUSTER,
        "RAY_CLUSTER_NAMESPACE": "resfeat",
        "RAY_CLOUD_INSTANCE_ID": f"{CLUSTER}-{group}-q4hzn",
        "RAY_NODE_TYPE_NAME": group,
        "KUBERAY_GEN_RAY_START_CMD": command,
        "RAY_PORT": str(PORT),
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        **_token(token),
    }


def _token(token: str) -> dict[str, str]:
    """By `authOptions`, where `secretName` has it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _with(template: Template, command: list[str], **variables: str) -> Template:
    """A template with the operator's command and variables, which the manifest does not set."""
    made = copy.deepcopy(template)
    container = made["spec"]["containers"][0]
    assert not {"command", "args"} & container.keys()
    assert not variables.keys() & {each["name"] for each in container["env"]}
    container["command"] = command
    container["env"] += [{"name": name, "value": value} for name, value in variables.items()]
    return made
