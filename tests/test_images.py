"""docker/: linted, and built as far as that goes without a container engine (images.py)."""

import subprocess
import sys
from pathlib import Path

import images
import pods
import pytest
import yaml

DOCKER = pods.ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
BIN = Path(sys.executable).parent


@pytest.mark.skipif(not (BIN / "hadolint").exists(), reason="no hadolint for this machine")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_hadolint_has_nothing_to_say(dockerfile):
    done = subprocess.run([BIN / "hadolint", dockerfile], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_the_code_comes_after_what_it_requires(dockerfile):
    """So that a change of the code makes no layer of several GB."""
    steps = images.steps(dockerfile)
    copied = [rest.split()[:-1] for word, rest in steps if word == "COPY"]
    assert all((pods.ROOT / path).exists() for paths in copied for path in paths)
    big = steps.index(next(each for each in steps if "-r requirements.txt" in each[1]))
    before = " ".join(rest for word, rest in steps[:big] if word == "COPY").split()
    assert "constraints.txt" in before and not {"resfeat", "README.md"} & set(before)
    installed = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    assert "-c constraints.txt" in installed[0] and "--no-deps ." in installed[1]
    words = [word for word, _ in steps]
    assert "HEALTHCHECK" not in words
    assert words.index("USER") > max(n for n, word in enumerate(words) if word == "RUN")
    ignored = (pods.ROOT / ".dockerignore").read_text().split()
    assert not {path.split("/")[0] for paths in copied for path in paths} & set(ignored)


def test_the_requirements_are_those_of_the_project():
    script = DOCKER / "requirements.py"
    done = subprocess.run(
        [sys.executable, script, "cluster", "faiss"], cwd=pods.ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith("torch>=") for line in lines)
    assert [line.partition(">")[0] for line in lines[-2:]] == ["ray[default]", "faiss-cpu"]
    missing = subprocess.run([sys.executable, script, "none"], cwd=pods.ROOT, capture_output=True)
    assert missing.returncode != 0


def test_compose_starts_a_head_and_workers_that_share_it():
    text = (DOCKER / "compose.yaml").read_text()
    assert "compose.yaml --profile gpu up" in text  # `up` itself has no such option
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"head", "worker", "gpu-worker"}
    assert services["head"]["ports"] == ["127.0.0.1:8265:8265"]
    for name, service in services.items():
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert ("--head" in service["entrypoint"]) == (name == "head")
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["tmpfs"] == ["/tmp"] and service["environment"]["HOME"] == "/tmp"
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["healthcheck"]["test"][:2] == ["CMD", "python"]
        waits = service.get("depends_on", {}).get("head", {}).get("condition")
        assert waits == (None if name == "head" else "service_healthy")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A published file, as torch hub names it: the real one cannot be downloaded everywhere."""
    import torch
    from reference import torchvision_model
    from torchvision.models import ResNet18_Weights

    folder = tmp_path_factory.mktemp("weights")
    path = folder / Path(ResNet18_Weights.DEFAULT.url).name
    torch.save(torchvision_model("resnet18", seed=0).state_dict(), path)
    return path


LOOK = """resfeat --version && python -c "
import os, pathlib, site, resfeat
installed = pathlib.Path(resfeat.__file__).parents[1] == pathlib.Path(site.getsitepackages()[0])
print(os.getuid(), os.getcwd(), installed, *sorted(os.listdir('/opt/resfeat')))
" """


@pytest.mark.more
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_every_step_of_an_image(dockerfile, weights):
    here = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}
    cache = "$root/opt/weights/hub/checkpoints"
    cached = f'mkdir -p "{cache}"; cp {weights} "{cache}/"'
    done = images.build(dockerfile, here, {"MODEL": "resnet18"}, LOOK, cached)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, origin, version, seen = done.stdout.splitlines()
    assert origin == "IMAGENET1K_V1"
    assert version.startswith("resfeat, version ")
    left = "LICENSE README.md constraints.txt pipelines pyproject.toml requirements.py"
    assert seen == f"10001 /home/resfeat True {left} requirements.txt resfeat"


@pytest.mark.more
def test_weights_that_cannot_be_had_end_the_build():
    """And not in an image that only seems to have them: there is no network here."""
    pods.skip_without()
    here = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(pods.ROOT)}
    (run,) = (rest for word, rest in images.steps(DOCKERFILES[0]) if "$MODEL" in rest)
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", run], capture_output=True, text=True,
        env={**here, "MODEL": "resnet18", "TORCH_HOME": "/nonexistent/weights"},
    )  # fmt: skip
    assert done.returncode != 0 and "cannot download" in done.stderr
    without = subprocess.run(["sh", "-c", run], capture_output=True, text=True, env=here)
    assert (without.returncode, without.stdout, without.stderr) == (0, "", "")
