"""Images that crash or hang the decoder: one failure row each, and nothing else is lost."""

import json
import shutil
import signal
import threading

import pyarrow.compute as pc
import pytest
from forked import start
from integration.test_resume import wait_for_parts
from PIL import Image
from seams import TREACHEROUS, after_import
from tables import rows

from resfeat import ExtractSpec, RuntimeOptions, extract
from resfeat.dataset import Layout
from resfeat.worker import worker

CRASH, HANG = "chelsea/killer.jpg", "rocket/killer.jpg"


@pytest.fixture(scope="module")
def killers(photos, once):
    """Photographs, of which one crashes the decoder and one hangs it; they are whole otherwise."""

    def write(folder):
        for subject in ("chelsea", "rocket", "coffee"):
            (folder / subject).mkdir()
            for photo in sorted((photos / subject).iterdir())[:14]:
                shutil.copy2(photo, folder / subject)
        jpeg = min((folder / "coffee").glob("*.jpg")).read_bytes()
        (folder / CRASH).write_bytes(jpeg + b"crash")
        (folder / HANG).write_bytes(jpeg + b"hang")

    return once("killers", write)


@pytest.fixture(scope="module")
def unharmed(killers, choices, extracted):
    """The same images by a decoder that none of them harms."""
    options = ["--workers", 0, "--shard-size", 8]
    return rows(extracted("unharmed", killers, *options, *choices))


@pytest.fixture
def treacherous(tmp_path):
    sources = {
        "resfeat.decoding.decode": TREACHEROUS,
        "resfeat.decoding.careful": "SECONDS = 3.0",
        "resfeat.worker.worker": "HUNG_SECONDS = 5.0",
    }
    return after_import(sources, tmp_path / "hook")


def check(output, unharmed):
    """Two failures, and every other image as if they had never been there."""
    embedded, failed = rows(output), rows(output, "failures")
    assert dict(zip(failed["id"].to_pylist(), failed["reason"].to_pylist(), strict=True)) == {
        CRASH: "decoder_crash",
        HANG: "timeout",
    }
    others = unharmed.filter(pc.invert(pc.is_in(unharmed["id"], failed["id"])))
    assert len(others) == len(unharmed) - 2
    assert embedded.equals(others)


@pytest.mark.ray
@pytest.mark.more
def test_the_images_that_kill_workers_are_found(killers, choices, unharmed, treacherous, tmp_path,
                                                command):  # fmt: skip
    output = tmp_path / "out"
    done = command("extract", killers, "-o", output, "--workers", 1, "--shard-size", 8,
                   "--log-json", *choices, env=treacherous)  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(output, unharmed)
    report = json.loads(done.stdout.splitlines()[-1])
    # One death for each of them; two where both shards that a worker held were innocent at first.
    assert 1 <= report["engine"]["worker_deaths"] <= 3


def test_an_image_that_hangs_in_this_process_is_found(killers, choices, unharmed, treacherous,
                                                      tmp_path, command):  # fmt: skip
    output = tmp_path / "out"
    words = ["extract", killers, "-o", output, "--workers", 0, "--shard-size", 8, *choices]
    # One that crashes takes this process with it; the next run knows that, and takes care.
    crashed = command(*words, env=treacherous)
    assert crashed.returncode == -11
    done = command(*words, env=treacherous)
    assert done.returncode == 0, done.stderr
    assert "was killed" in done.stderr
    assert "Workers that died and were replaced: 1, with " in done.stdout
    check(output, unharmed)
    # What is known to kill is done once more with the same care.
    again = command(*words, "--retry-failed", env=treacherous)
    assert again.returncode == 0, again.stderr
    check(output, unharmed)


def test_a_hang_in_the_midst_of_a_run_loses_no_shard(tmp_path, monkeypatch):
    """The first two of four shards hang, both in hand at once."""
    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    for number in (1, 3):
        with (tmp_path / f"{number}.png").open("ab") as file:
            file.write(b"hang")
    over, decode = threading.Event(), worker.decode

    def hanging(data, *rest):
        if data.endswith(b"hang"):
            over.wait(60)
        return decode(data, *rest)

    monkeypatch.setattr(worker, "decode", hanging)
    monkeypatch.setattr(worker, "HUNG_SECONDS", 1.0)
    try:
        report = extract(
            ExtractSpec(
                sources=(str(tmp_path),),
                output=str(tmp_path / "out"),
                model="cifar_resnet20",
                weights="random:0",
                shard_size=2,
                runtime=RuntimeOptions(workers=0),
            )
        )
    finally:
        over.set()
    assert (report.status, report.embedded, report.failed) == ("finished", 8, 0)
    assert report.engine["worker_deaths"] == 1


def test_a_signal_is_heeded_while_an_image_hangs(killers, choices, tmp_path):
    sources = {
        "resfeat.decoding.decode": TREACHEROUS,
        "resfeat.worker.worker": "HUNG_SECONDS = 3600.0",
        "resfeat.engines": "DRAIN_SECONDS = 3.0",
    }
    output = tmp_path / "out"
    words = ["extract", killers / "rocket", "-o", output, "--workers", 0, "--shard-size", 8]
    process = start(*words, *choices, env=after_import(sources, tmp_path / "hook"))
    wait_for_parts(process, output, 1)
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=30)
    assert process.returncode == 130, complained
    assert "Traceback" not in complained
    assert not list(Layout(output).tmp.iterdir())


@pytest.mark.more
@pytest.mark.ray
def test_an_image_that_crashes_while_a_sample_is_taken_harms_nobody(
    killers, choices, treacherous, tmp_path, command
):
    """The driver decodes some images itself, to compare runtimes. Here it is all that there are."""
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(killers / CRASH, folder)
    shutil.copy(next((killers / "coffee").glob("*.jpg")), folder)
    done = command("extract", folder, "-o", tmp_path / "out", "--workers", 1,
                   "--max-error-rate", 1, *choices, "--runtime", "openvino",
                   env=treacherous)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out", "failures")["reason"].to_pylist() == ["decoder_crash"]
    assert len(rows(tmp_path / "out")) == 1
