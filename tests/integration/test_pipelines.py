"""The pipelines, each run as its users run it."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from broken import write_broken
from later import Later
from photos import photographs
from PIL import Image
from safetensors.torch import load_file
from test_page import told_by

demo = Later("demo")  # which takes timm and torchvision along
edits = Later("benchmarks.edits")
packaged = Later("packaged")
timm = Later("timm")

PIPELINES = Path(__file__).parents[2] / "pipelines"
QUICK = ["--model", "cifar_resnet20", "--weights", "random:0", "--runtime", "torch"]


def run(*command, **options):
    words = list(map(str, command))
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def some(photos, tmp_path):
    """Sixty photographs and the broken ones."""
    folder = tmp_path / "some"
    folder.mkdir()
    for photo in sorted(photos.rglob("*.*"))[:60]:
        os.link(photo, folder / photo.name)
    write_broken(folder)
    return folder


@pytest.mark.more
@pytest.mark.ray
def test_demo(tmp_path):
    nothing_cached = {**os.environ, "TORCH_HOME": str(tmp_path / "hub")}
    command = [sys.executable, PIPELINES / "demo.py", tmp_path / "demo", "--count", 32]
    done = run(*command, env=nothing_cached)
    assert done.returncode == 0, done.stdout + done.stderr
    if "cannot download" in done.stdout:
        assert f"the demo takes {packaged.MODEL} and the ImageNet weights of" in done.stdout
        assert f"--model {packaged.MODEL} --weights " in done.stdout
    assert "Finished: 35 embedded and 0 failed of 35 images" in done.stdout
    assert "35 rows; the first is astronaut/00000.jpg: [" in done.stdout
    with Image.open(tmp_path / "demo" / "nearest.png") as sheet:
        assert sheet.size == (8 + 7 * 168, 8 + 4 * 200)
    assert re.search(r"exact +astronaut/00000_copy.jpg", done.stdout)
    assert "35 images in 9 classes, 5 folds" in done.stdout
    assert (tmp_path / "demo" / "duplicates.html").exists()
    assert (tmp_path / "demo" / "confusion.png").exists()
    told = told_by((tmp_path / "demo" / "page.html").read_text())
    ((members, count, least),) = told["groups"]
    assert count >= 2 and least >= 0.98
    assert all(told["ids"][n].startswith("astronaut/00000") for n in members)


def test_the_demo_says_in_one_line_whose_weights_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
    options = demo.network(tmp_path)
    waiting, taken = capsys.readouterr().out.splitlines()
    assert waiting == "waiting for the weights of resnet50 ..."
    assert taken.startswith("cannot download https://")
    assert taken.endswith(f"; the demo takes {packaged.MODEL} and the ImageNet weights of "
                          f"{packaged.PACKAGE}")  # fmt: skip
    assert options == ["--model", packaged.MODEL, "--weights", tmp_path / "imagenet.safetensors"]


def test_the_packaged_weights_know_what_they_see(tmp_path):
    """With the classifier that a dataset leaves out: the tensors have their right names."""
    packaged.write_weights(tmp_path / "imagenet.safetensors")
    network = timm.create_model(packaged.NETWORK, pretrained=False).eval()
    network.load_state_dict(load_file(tmp_path / "imagenet.safetensors"))
    to_pixels = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    seen = photographs()
    pictures = torch.stack([to_pixels(seen[name]) for name in ("coffee", "china", "chelsea")])
    with torch.inference_mode():
        espresso, palace, cat = network(pictures).argmax(dim=1).tolist()
    assert (espresso, palace) == (967, 698) and cat in (281, 282, 285)


def test_edits_are_told_by_what_they_leave_as_it_was(tmp_path, capsys):
    gallery = edits.tiles(photographs()["coffee"])[:16]
    networks = {"network": ("cifar_resnet20", "random:0")}
    head, *rows = edits.measure(gallery, [2, 9], networks, tmp_path)
    assert head[2:] == ["network", "raw pixels", "colour histogram", "perceptual hash"]
    assert len(rows) == 2 * 9 + 2 and all(0 <= float(cell) <= 1 for row in rows for cell in row[2:])
    recall = {(row[0], row[1]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}
    assert set(recall["resize", "to a half"].values()) == {"1.00"}
    for way in "left to right", "upside down":
        assert recall["flip", way]["colour histogram"] == "1.00"
    assert recall["grey", "no colour"]["perceptual hash"] == "1.00"
    assert "flip  upside down" in capsys.readouterr().out


def test_of_equally_near_tiles_each_is_found_by_its_share():
    first, second, *_ = edits.tiles(photographs()["coffee"])
    for way in edits.PLAIN:
        find = edits.by_vectors([first, second, first], [0, 1], way)
        assert find([first, second]).tolist() == [0.5, 1]
        assert find([second, first]).tolist() == [0, 0]


@contextmanager
def head(**variables):
    """The environment that reaches a Ray head with its job server, on the loopback address, and
    that head's own."""
    # Ray's servers ask for a token unless they are told not to; so does this one.
    environment = {
        **os.environ,
        **variables,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    ports = [_free_port() for _ in range(3)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
         "--node-ip-address=127.0.0.1", f"--port={ports[0]}", "--num-cpus=2",
         "--include-dashboard=true", f"--dashboard-port={ports[1]}",
         f"--dashboard-agent-listen-port={ports[2]}", "--disable-usage-stats"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while socket.socket().connect_ex(("127.0.0.1", ports[1])):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.5)
    try:
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.more
@pytest.mark.ray
def test_ray_job(some, tmp_path):
    command = [PIPELINES / "ray_job.sh", some, "-o", tmp_path / "out", *QUICK, "--workers", 1]
    with head() as there:
        done = run(*command, "--max-error-rate", 0.2, env=there)
        refused = run(*command, "--model", "cifar_resnet32", env=there)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 embedded and 12 failed of 72 images" in done.stdout
    (report,) = (tmp_path / "out" / "_resfeat" / "runs").iterdir()
    assert json.loads(report.read_text())["engine"]["address"] == "auto"
    assert refused.returncode != 0 and "another model" in refused.stdout + refused.stderr
    assert "SRC... -o OUT" in run(PIPELINES / "ray_job.sh").stdout


# What pip's editable install adds, and what else might find resfeat, is not there.
NOT_INSTALLED = """
import sys

def is_of_ours(finder):
    return "resfeat" in getattr(finder, "__module__", "")

sys.meta_path[:] = [finder for finder in sys.meta_path if not is_of_ours(finder)]
"""


@pytest.mark.more
@pytest.mark.ray
def test_a_ray_job_brings_the_code_where_resfeat_is_not_installed(some, tmp_path):
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(NOT_INSTALLED)
    command = [PIPELINES / "ray_job.sh", some, "-o", tmp_path / "out", *QUICK, "--workers", 1]
    with head(PYTHONPATH=str(hook)) as there:
        without = run(*command, env=there)
        done = run(*command, "--max-error-rate", 0.2, env={**there, "SEND_CODE": "1"})
    assert without.returncode != 0 and "No module named resfeat" in without.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 embedded and 12 failed of 72 images" in done.stdout


@pytest.mark.more
@pytest.mark.ray
def test_the_simulation_of_millions_runs_with_thousands(tmp_path):
    """`make scale` measures with parts of ours that nothing else puts together so."""
    script = PIPELINES.parent / "tests" / "benchmarks" / "scale.py"
    done = run(sys.executable, script, "--one", 5000, tmp_path / "photos", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["count"] == 5000 and told["images_per_second"] > 0
