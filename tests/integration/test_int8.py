"""int8: calibrated once, and the same network in every run of a dataset."""

import json
import shutil
import threading

import pytest
from tables import rows

from resfeat import ExtractSpec, RuntimeOptions, extract, fidelity
from resfeat.fidelity import calibration
from resfeat.fidelity.sample import CALIBRATION
from resfeat.reporting import Progress

PHOTOS, PARTS = 48, 4
CHOICES = (
    "--model", "resnet18", "--weights", "random:0", "--precision", "int8",
    "--resize", "72", "--crop", "64", "--shard-size", PHOTOS // PARTS,
)  # fmt: skip


@pytest.fixture(scope="module")
def few(photos, once):
    """So many of the photographs, on all of which int8 is calibrated. Not to be changed."""

    def write(folder):
        for photo in sorted(photos.rglob("*.*"))[::10][:PHOTOS]:
            (folder / photo.name).hardlink_to(photo)

    return once("calibrated", write)


@pytest.fixture(scope="module")
def whole(few, once, command):
    """The photographs in int8, in one undisturbed run. Not to be changed.

    In a process of its own: what ran in this one before moves the last bits of a calibration.
    """

    def write(folder):
        done = command("extract", few, "-o", folder / "out", "--workers", 0, *CHOICES)
        assert done.returncode == 0, done.stderr

    return once("int8", write) / "out"


@pytest.fixture
def half(whole, tmp_path):
    """The same with two parts missing."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for part in sorted((output / "embeddings").iterdir())[1:3]:
        part.unlink()
    return output


def parts(output):
    return {path.name: path.read_bytes() for path in sorted((output / "embeddings").iterdir())}


def test_files_and_report_say_what_network_it_was(whole):
    spec = json.loads((whole / "_resfeat" / "spec.json").read_text())
    assert 0.99 < spec["parity"]["minimum"] < 0.99999
    told = json.loads(rows(whole).schema.metadata[b"resfeat"])
    assert told["quantised"] == spec["quantised"]
    (report,) = (whole / "_resfeat" / "runs").iterdir()
    told = json.loads(report.read_text())
    assert told["notes"][0].startswith(f"int8: calibrated on {PHOTOS} of the images in ")
    engine = told["engine"]
    assert (engine["runtime"], engine["device"]) == ("openvino", "cpu")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.more)])
def test_a_resume_takes_the_network_that_is_there(workers, half, whole, few, resfeat):
    done = resfeat("extract", few, "-o", half, "--workers", workers, *CHOICES)
    assert done.returncode == 0, done.stderr
    assert "calibrated" not in done.stderr
    assert parts(half) == parts(whole)


@pytest.mark.more
@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_network_that_is_lost_is_made_again_the_same(damage, half, whole, few, command):
    network = half / "_resfeat" / "int8" / "network.bin"
    if damage == "gone":
        network.unlink()
    else:
        network.write_bytes(network.read_bytes()[:-1] + b"?")
    done = command("extract", few, "-o", half, "--workers", 0, *CHOICES)
    assert done.returncode == 0, done.stderr
    assert f"calibrated on {PHOTOS}" in done.stderr
    assert parts(half) == parts(whole)


@pytest.mark.more  # it calibrates before it knows
def test_another_network_is_not_mixed_in(half, few, resfeat):
    shutil.rmtree(half / "_resfeat" / "int8")
    spec = half / "_resfeat" / "spec.json"
    content = json.loads(spec.read_text())
    spec.write_text(json.dumps({**content, "quantised": "0" * 64}))
    before = parts(half)
    done = resfeat("extract", few, "-o", half, "--workers", 0, *CHOICES)
    assert done.returncode == 1
    assert "network.xml is gone or changed" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert parts(half) == before


def test_queries_are_embedded_by_the_same_network(whole, few, resfeat):
    query = sorted(few.glob("*.jpg"))[0]
    done = resfeat("search", whole, query, "-k", 1, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    nearest = found["neighbours"][0]
    assert nearest["id"] == query.name
    assert nearest["cosine"] > 0.9999


def test_queries_are_not_embedded_by_another_network(half, few, resfeat):
    network = half / "_resfeat" / "int8" / "network.bin"
    network.write_bytes(network.read_bytes()[:-1] + b"?")
    query = sorted(few.glob("*.jpg"))[0]
    for _ in range(2):  # changed, then gone
        done = resfeat("search", half, query)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "network.xml is gone or changed" in line and "bring it back" in line
        network.unlink(missing_ok=True)


def test_calibration_is_shown_and_stopped_and_nothing_waits_for_it(photos, tmp_path, monkeypatch):
    """The reference is begun beside it, and its pictures are asked for by `quantise` alone, which
    has the network to make ready meanwhile."""
    told, compared, decoded = [], threading.Event(), threading.Event()
    measure, decode = fidelity.reference, calibration.pictures

    def reference(*given):
        compared.set()
        return measure(*given)

    def decoding(*given):
        assert decoded.wait(60)
        return decode(*given)

    def quantise(identity, tensors, pictures, network, on_picture):
        assert compared.wait(60)
        decoded.set()
        wanted = len(pictures())
        for used in range(wanted):
            on_picture(used, wanted)

    monkeypatch.setattr(fidelity, "reference", reference)
    monkeypatch.setattr(calibration, "pictures", decoding)
    monkeypatch.setattr("resfeat.runtimes.openvino.quantise", quantise)
    spec = ExtractSpec(
        sources=(str(photos),),
        output=str(tmp_path / "out"),
        model="resnet18",
        weights="random:0",
        resize=72,
        crop=64,
        precision="int8",
        runtime=RuntimeOptions(workers=0),
    )
    report = extract(spec, on_progress=told.append, stopping=lambda: len(told) == 20)
    assert (report.status, report.embedded) == ("interrupted", 0)
    assert told == [Progress(CALIBRATION, used, doing="calibrating") for used in range(20)]
    assert not (tmp_path / "out" / "_resfeat" / "int8" / "network.xml").exists()
