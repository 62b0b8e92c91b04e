"""Every command of the README is run, in its order, as a newcomer would."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from command import share_ray
from later import Later
from object_store import ObjectStore
from reference import torchvision_model

from resfeat.backbones.ours import LIKE_TORCHVISION
from resfeat.fidelity.parity import LEAST, LEAST_OTHERWISE
from resfeat.runtimes import OFFERED, REFERENCE

models = Later("torchvision.models")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PARITY = (ROOT / "tests" / "benchmarks" / "PARITY.md").read_text()
DOCUMENTS = [
    str(path.relative_to(ROOT))
    for folder in (".", "tests", "tests/benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def cells(line):
    """What stands between the bars of a table's row."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


SESSIONS = [[line[2:] for line in block.splitlines()] for block in blocks("console")]
FIRST = next(line for lines in SESSIONS for line in lines if line.startswith("resfeat extract"))


@pytest.fixture(scope="module")
def home(photos, tmp_path_factory):
    """photos/cat, photos/dog, both in shards/photos.tar and captions.csv, job.toml, finetuned.pth,
    and published weights in torch hub's cache."""
    folder = tmp_path_factory.mktemp("readme")
    for name, subject in (("cat", "chelsea"), ("dog", "rocket")):
        (folder / "photos" / name).mkdir(parents=True)
        for number, photo in enumerate(sorted((photos / subject).rglob("*.jpg"))[:8]):
            os.link(photo, folder / "photos" / name / f"{number}.jpg")
    there = (photo.relative_to(folder) for photo in (folder / "photos").rglob("*.jpg"))
    captions = "".join(f"{photo},a {photo.parent.name}\n" for photo in there)
    (folder / "captions.csv").write_text(f"path,caption\n{captions}")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "photos.tar", "w") as tar:
        tar.add(folder / "photos", "photos")
    (folder / "job.toml").write_text(*blocks("toml"))
    cache = folder / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = cache / os.path.basename(models.ResNet50_Weights.DEFAULT.url)
    torch.save(torchvision_model("resnet50", seed=0).state_dict(), published)
    torch.save(torchvision_model("resnet18", seed=1).state_dict(), folder / "finetuned.pth")
    return folder


@pytest.fixture(scope="module")
def store(home):
    """A bucket that holds the photographs, where the command finds its object store."""
    with ObjectStore() as store:
        bucket = store.files("bucket")
        for photo in (home / "photos").rglob("*.jpg"):
            with bucket.open_output_stream(str(photo.relative_to(home))) as file:
                file.write(photo.read_bytes())
        os.environ.update(store.environment)
        yield
        for name in store.environment:
            del os.environ[name]


def run(words, folder):
    """Run words of a command line, in a folder."""
    environment = {**os.environ, "TORCH_HOME": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Of what takes five minutes otherwise.
FEW = ["--depths", "20", "--epochs", "1", "--images", "20"]

# Some have one extract after another, all of which other tests try, too. test_learning.py and
# test_nightly.py try the pipelines in less time, test_doctor.py the doctor, and who made .venv the
# installation.
ELSEWHERE = ("degradation", "nightly.py", "resfeat doctor", "pip install")
LATER = [
    n for n, lines in enumerate(SESSIONS)
    if (FIRST not in lines and sum("resfeat extract" in line for line in lines) > 1)
    or any(each in line for line in lines for each in ELSEWHERE)
]  # fmt: skip


@pytest.mark.ray
@pytest.mark.parametrize(
    "session",
    [pytest.param(n, marks=[pytest.mark.more] * (n in LATER)) for n in range(len(SESSIONS))],
)
def test_the_commands(session, home, store, resfeat, monkeypatch):
    """In processes of their own the first, which starts its own Ray, and what talks to the store,
    which is in this one; the others share a Ray."""
    assert len(SESSIONS[session]) >= 1
    monkeypatch.chdir(home)
    monkeypatch.setattr("resfeat.reporting.bench.SECONDS", 0.2)  # of each stage, for all cores
    share_ray()
    for command in SESSIONS[session]:
        words = shlex.split(command)
        variables = dict(word.split("=", 1) for word in words if word.startswith("RESFEAT_"))
        program, *words = words[len(variables) :]
        if program == "make":  # these run this test; tests/test_project.py looks at them
            run(["make", "-n", "-C", str(ROOT), *words], home)
        elif program == "pip":
            where = [str(ROOT) if word == "." else word for word in words]
            where = [str(ROOT / word) if word == "constraints.txt" else word for word in where]
            run([sys.executable, "-m", "pip", *where, "--dry-run", "--no-deps", "--quiet"], home)
        elif program == "python":
            few = FEW if "degradation" in words[0] else []
            run([sys.executable, str(ROOT / words[0]), *words[1:], *few], home)
        else:
            assert program == "resfeat"
            if command == FIRST or "s3://" in command:
                run([sys.executable, "-m", "resfeat", *words], home)
                continue
            done = resfeat(*words, env={"TORCH_HOME": str(home), **variables})
            assert done.returncode == 0, done.stdout + done.stderr
    if FIRST in SESSIONS[session]:
        assert (home / "nearest.png").exists()


@pytest.mark.ray
def test_the_python(home, store, resfeat, monkeypatch):
    if not (home / "embeddings").exists():
        (session,) = (n for n, commands in enumerate(SESSIONS) if FIRST in commands)
        test_the_commands(session, home, store, resfeat, monkeypatch)
    # One process, which imports torch once; each block has only the names that it makes itself.
    every = "import sys\nfor block in sys.argv[1:]:\n    exec(block, {})"
    told = run([sys.executable, "-c", every, *blocks("python")], home)
    assert told.startswith("16 0 ") and "16 (16, 512)" in told


def test_the_parity_tables_are_whole_and_within_the_goals_and_the_readme_says_no_more():
    rows = [cells(line) for line in PARITY.splitlines()]
    compared = {row[0]: row[1:] for row in rows if row and row[0] in LIKE_TORCHVISION}
    assert list(compared) == list(LIKE_TORCHVISION)
    for levels, relative in compared.values():
        assert int(levels) <= 1 and float(relative) <= 1e-5
    cosines: dict[tuple[str, ...], float] = {}
    for row in rows:
        if row and row[0].endswith(", CPU") and row[1] != "model":
            place = tuple(row[0].split(", "))
            cosines[place] = min(float(row[2]), cosines.get(place, 1.0))
    assert set(cosines) >= {
        (precision, runtime, "CPU")
        for runtime, precisions in OFFERED.items()
        for precision in precisions
    } - {(REFERENCE, "torch", "CPU")}
    for (precision, *_), least in cosines.items():
        assert least >= LEAST.get(precision, LEAST_OTHERWISE)
    assert sum("JPEGs of" in row[0] for row in rows if row) == 3

    (largest,) = re.findall(r"embeddings differ by at most (\S+)", README)
    assert max(float(relative) for _, relative in compared.values()) <= float(largest)
    told = {name: float(least) for least, name in re.findall(r"(0\.9+\d*) in (\w+)", README)}
    assert set(told) == {precision for precision, *_ in cosines} - {REFERENCE}
    for (precision, *_), least in cosines.items():
        assert least >= told.get(precision, 1.0)


def test_the_figures_of_the_readme_are_those_that_were_measured():
    results = (ROOT / "tests" / "benchmarks" / "RESULTS.md").read_text()
    rows = [row for line in results.splitlines() if len(row := cells(line)) == 5]
    measured = {(rate, ratio, whole) for _, rate, ratio, _, whole in rows}
    (table,) = re.findall(r"^\| \| images/s .*\n.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    for _, *figures in map(cells, table.splitlines()):
        assert tuple(figures) in measured


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_that_are_linked_to_are_there(document):
    place = ROOT / document
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", place.read_text()):
        assert (place.parent / target).exists(), target
