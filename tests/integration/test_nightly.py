"""A night's work, as nightly.py does it: over a folder that changes, twice at once, killed."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nightly
import psutil
import pyarrow.parquet as pq
import pytest
from command import call, error_of
from forked import start
from later import Later
from object_store import ObjectStore
from PIL import Image
from seams import after_import
from small import write_pictures
from tables import rows

from resfeat.dataset import Layout, held, open_dataset
from resfeat.downstream import open_index

faiss = Later("faiss")

SCRIPT = Path(nightly.__file__)
README = (SCRIPT.parents[1] / "README.md").read_text()
QUICK = ["--model", "cifar_resnet20", "--weights", "random:0", "--runtime", "torch",
         "--workers", 0]  # fmt: skip
COUNT = 20
DONE, MANY, WRONG, USAGE, BUSY = 0, 3, 1, 2, 75

# A night stops, or is killed, where AT says; each is run inside the module of its name.
AT = """
import os, signal

number = getattr(signal, os.environ.get("SIGNAL", "SIGKILL"))
at = lambda place: place == os.environ.get("AT") and os.kill(os.getpid(), number)
"""
PLACES = {
    "resfeat.dataset.commit": "def on_step(step):\n    at(step)\n",
    "resfeat.downstream.index.indexing": (
        "without = digest_of\n\ndef digest_of(path):\n    at('index')\n    return without(path)\n"
    ),
    "resfeat.downstream.page.page": (
        "without = render\n\ndef render(**told):\n    at('page')\n    return without(**told)\n"
    ),
    "resfeat.storage.draft": (
        "without = write_whole\n\n"
        "def write_whole(drafts, location, content):\n"
        "    if location.name == 'page.html' and os.environ.get('AT') == 'draft':\n"
        "        DiskDraft(drafts, location.name).sink.write_bytes(content[:1000])\n"
        "        at('draft')\n"
        "    without(drafts, location, content)\n"
    ),
}


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    sources = {module: source + AT for module, source in PLACES.items()}
    return after_import(sources, tmp_path_factory.mktemp("at"))


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "photos", COUNT)
    return tmp_path / "photos"


def night(*words, env=None):
    return call(*words, env=env, program=nightly.main)


@pytest.fixture
def started(hooks):
    """A night in a process of its own that sends itself a signal at a place. It does not outlive
    the test, not even if it is stopped."""
    begun = []

    def begin(at, number, *words):
        begun.append(start(*words, env={**hooks, "AT": at, "SIGNAL": number}, script=SCRIPT))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()


def told_by(output):
    """What the page says."""
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>',
                         (output / "page.html").read_text(), re.DOTALL)  # fmt: skip
    return json.loads(data)


def check(output, embedded, failed=0):
    """The dataset has so many rows, the index has the same ids, the page says so."""
    ids = rows(output)["id"].to_pylist()
    dataset = open_dataset(output)
    assert (len(ids), dataset.failures.count_rows()) == (embedded, failed)
    index = open_index(dataset)
    assert index.stale is None
    assert sorted(index.ids["id"].to_pylist()) == ids
    folder = output / "_resfeat" / "index" / "avgpool"
    assert faiss.read_index(str(folder / "index.faiss")).ntotal == embedded
    assert pq.read_table(folder / "ids.parquet").num_rows == embedded
    told = told_by(output)
    assert told["counts"] == {"images": embedded + failed, "embedded": embedded, "failed": failed,
                              "shards": told["counts"]["shards"], "shards_left": 0}  # fmt: skip
    shown = {told["ids"][row] for row in range(told["map"]["rows"])}
    assert shown == set(ids)
    names = {path.name for path in output.iterdir()}
    assert names - {"failures"} == {"README.md", "_resfeat", "embeddings", "page.html"}
    left = [each for each in (output / "_resfeat" / "tmp").rglob("*") if each.is_file()]
    assert left == []


def content(folder):
    """All that is in a folder, and since when."""
    paths = sorted(folder.rglob("*"))
    return [(path, path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths]


def wait_for_stop(process):
    deadline = time.monotonic() + 120
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_three_nights_over_a_folder_that_changes(folder, tmp_path):
    output = tmp_path / "out"
    first = night(folder, output, *QUICK)
    assert first.returncode == DONE, first.stderr
    check(output, COUNT)

    pictures = sorted(folder.rglob("*.*"))
    pictures[0].unlink()
    Image.new("RGB", (60, 50), "red").save(pictures[1])
    Image.new("RGB", (70, 50), "blue").save(folder / "new.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    second = night(folder, output, *QUICK)
    assert second.returncode == DONE, second.stderr
    assert "2 added, 1 changed, 1 removed, 18 kept" in second.stdout
    assert "Nothing is wrong" in second.stdout
    check(output, COUNT, failed=1)
    assert "new.png" in rows(output)["id"].to_pylist()

    os.remove(folder / "new.png")
    shutil.copy(folder / pictures[2], folder / "broken.jpg")
    third = night(folder, output, *QUICK)
    assert third.returncode == DONE, third.stderr
    assert "0 added, 1 changed, 1 removed, 19 kept" in third.stdout
    check(output, COUNT)


def refused(folder, output):
    """A second start: one line, an exit code of its own, and nothing changed."""
    before = content(output)
    second = night(folder, output, *QUICK)
    assert (second.returncode, second.stdout) == (BUSY, ""), second.stderr
    assert content(output) == before
    return error_of(second.stderr)


@pytest.mark.parametrize("at", [pytest.param("checked", marks=pytest.mark.more), "page"])
def test_a_second_start_at_once_is_refused(at, folder, tmp_path, started):
    """While the first writes rows, or makes the page. SIGTERM ends that one there, with its code,
    though the rows were the last that there were to write."""
    output = tmp_path / "out"
    first = started(at, "SIGSTOP", folder, output, *QUICK)
    wait_for_stop(first)
    assert refused(folder, output) == (
        f"Busy: another night is at work on {output}: nothing was changed"
    )
    first.terminate()
    first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 128 + signal.SIGTERM, first.communicate()
    assert not (output / "page.html").exists()
    assert night(folder, output, *QUICK).returncode == DONE
    check(output, COUNT)


def test_a_night_is_titled_by_its_dataset(tmp_path):
    """And by no other argument, which may hold secrets."""
    program = (
        "import pathlib, nightly\n"
        "def night(*asked):\n"
        "    files = 'cmdline', 'comm'\n"
        "    told = [pathlib.Path('/proc/self', file).read_text() for file in files]\n"
        "    raise SystemExit(repr(told))\n"
        "nightly.night = night\n"
        "nightly.main()"
    )
    path = filter(None, [str(SCRIPT.parent), os.environ.get("PYTHONPATH")])
    words = [sys.executable, "-c", program, "s3://me:planted@bucket/photos", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    line, name = ast.literal_eval(done.stderr)
    assert line.rstrip("\0") == f"resfeat-nightly {tmp_path / 'out'}"
    assert name.rstrip() == "resfeat-nightly"


def test_a_start_while_any_run_writes_is_refused(folder, tmp_path):
    output = tmp_path / "out"
    assert night(folder, output, *QUICK).returncode == DONE
    with held(Layout(output)):
        assert f"Busy: process {os.getpid()}" in refused(folder, output)


STEPS = ["written", "noted", "embeddings", "index", "page", "draft"]


@pytest.mark.parametrize(
    ("nights", "steps"),
    [(1, ["index"]), *(pytest.param(n, STEPS, marks=pytest.mark.more) for n in (0, 1))],
)
def test_killed_at_a_step_and_started_again_it_completes(nights, steps, folder, tmp_path, started):
    """Each start goes on from where the one before was killed. In a later night, the page is that
    of the night before until all is done."""
    output, page = tmp_path / "out", None
    for _ in range(nights):
        assert night(folder, output, *QUICK).returncode == DONE
        page = (output / "page.html").read_bytes()
        sorted(folder.rglob("*.*"))[0].unlink()
        Image.new("RGB", (60, 50), "red").save(folder / "new.png")
    for step in steps:
        killed = started(step, "SIGKILL", folder, output, *QUICK)
        assert killed.wait(120) == -signal.SIGKILL, killed.communicate()
        there = output / "page.html"
        assert (there.read_bytes() if there.exists() else None) == page
        drafts = [*(output / "_resfeat" / "tmp").rglob("*-page.html")]
        assert len(drafts) == (step == "draft")
    again = night(folder, output, *QUICK)
    assert again.returncode == DONE, again.stderr
    check(output, COUNT)
    assert ("new.png" in rows(output)["id"].to_pylist()) == bool(nights)


def test_without_faiss_it_says_so_and_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    done = night(folder, tmp_path / "out", *QUICK)
    assert done.returncode == DONE, done.stderr
    told = "Passed over: faiss is not installed (pip install 'resfeat[faiss]'): no index"
    assert told in done.stdout.splitlines()
    assert told_by(tmp_path / "out")["counts"]["embedded"] == COUNT
    assert not (tmp_path / "out" / "_resfeat" / "index").exists()


def test_few_images_and_none(tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    empty = night(photos, tmp_path / "deep" / "out", *QUICK)
    assert empty.returncode == USAGE and "no images in" in error_of(empty.stderr)
    assert not (tmp_path / "deep").exists()
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    broken = night(photos, output, *QUICK)
    assert broken.returncode == MANY
    assert "Passed over: no image gave an embedding: no index and no page" in broken.stdout
    Image.new("RGB", (50, 40), "red").save(photos / "red.png")
    one = night(photos, output, *QUICK)
    assert one.returncode == MANY, one.stderr
    check(output, 1, failed=1)


def test_a_first_night_that_was_cut_off_and_damage(folder, tmp_path):
    output = tmp_path / "out"
    assert night(folder, output, *QUICK).returncode == DONE
    part = output / "embeddings" / "part-00000.parquet"
    part.unlink()
    Image.new("RGB", (50, 40), "blue").save(folder / "newer.png")
    cut_off = night(folder, output, *QUICK)
    assert cut_off.returncode == DONE, cut_off.stderr
    assert "1 added, 0 changed, 0 removed, 20 kept" in cut_off.stdout
    check(output, COUNT + 1)

    page = (output / "page.html").read_bytes()
    pq.write_table(pq.read_table(part), part)  # which the index and the page would not notice
    damaged = night(folder, output, *QUICK)
    assert damaged.returncode == WRONG and "part-00000.parquet: it was changed" in damaged.stdout
    assert "give --repair, then the extract command" in damaged.stdout.splitlines()[-1]
    assert (output / "page.html").read_bytes() == page
    assert call("verify", output, "--repair").returncode == 1
    assert night(folder, output, *QUICK).returncode == DONE
    check(output, COUNT + 1)
    usage = night(folder, output, *QUICK, "--workers", -1)
    assert usage.returncode == USAGE and "--workers -1" in usage.stderr
    assert night(folder, output, "--no-such").returncode == USAGE


@pytest.mark.more
def test_an_output_in_a_store_has_neither_index_nor_page(folder):
    with ObjectStore() as store:
        store.files("bucket")
        done = night(folder, "s3://bucket/out", *QUICK, env=store.environment)
    assert done.returncode == DONE, done.stderr
    assert "Passed over: OUT is in a store: no index and no page" in done.stdout


@pytest.mark.parametrize(
    ("language", "command"),
    [
        pytest.param("crontab", r"0 2 \* \* \* (.*)\n", id="cron"),
        pytest.param("ini", r"(?:.*\n)+ExecStart=(.*)\n(?:.*\n)+", id="systemd",
                     marks=pytest.mark.more),
    ],
)  # fmt: skip
def test_the_lines_of_the_readme_for_schedulers(language, command, folder, tmp_path):
    """As they stand, in a shell as cron has it, but for where things are."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
    line = re.fullmatch(command, block)[1]
    (tmp_path / "opt").mkdir()
    for name, there in ((".venv", Path(sys.executable).parents[1]), ("pipelines", SCRIPT.parent)):
        (tmp_path / "opt" / name).symlink_to(there)
    line = line.replace("/opt/resfeat", str(tmp_path / "opt")).replace("/data/", f"{tmp_path}/")
    quick = zip(QUICK[::2], QUICK[1::2], strict=True)
    given = {f"RESFEAT_{name.strip('-').upper()}": str(value) for name, value in quick}
    given |= {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}
    done = subprocess.run(["/bin/sh", "-c", line], env={"PATH": "/usr/bin:/bin", **given}, cwd="/",
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == DONE, done.stderr
    check(tmp_path / "embeddings", COUNT)
    assert (tmp_path / "resfeat.prom").exists() == ("--metrics" in line)
    if language == "ini":
        told = dict(each.split("=", 1) for each in block.splitlines() if "=" in each)
        assert getattr(os, f"EX_{told['SuccessExitStatus']}") == nightly.BUSY
