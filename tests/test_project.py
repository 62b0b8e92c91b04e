"""The project's own files: they agree with each other and name nothing that they should not."""

import re
import subprocess
import tomllib
from importlib.metadata import metadata
from pathlib import Path

from resfeat.cli.doctor.software import EXTRAS

ROOT = Path(__file__).parents[1]


def test_every_dependency_is_pinned_by_name_and_no_host():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pattern = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9][^ ;]*( ; .+)?")
    assert [line for line in lines if not pattern.fullmatch(line)] == []
    pinned = {line.partition("==")[0] for line in lines}
    wanted = {
        re.split(r"[^A-Za-z0-9-]", need)[0].lower()
        for need in metadata("resfeat").get_all("Requires-Dist")
    }
    assert wanted - pinned <= {"resfeat"}


def test_what_an_extra_brings_is_told_by_one_function_and_the_extra_is_there():
    package = ROOT / "resfeat"
    code = {
        path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")
    }
    asked = re.findall(r"\b(?:missing|install)\([^()]*?[\"'](\w+)[\"'](?:, \", or [^\"]*\")?\)",
                       "\n".join(code.values()))  # fmt: skip
    assert {"faiss", "heif", "int8", "probe", "timm", "umap"} <= {*asked}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*asked, *(extra for _, extra in EXTRAS.values())} <= {*extras["optional-dependencies"]}
    # Help texts of commands say it, too.
    told = [name for name, text in code.items() if "pip install 'resfeat[" in text]
    assert [name for name in told if not name.startswith("cli/")] == ["errors.py"]


def test_contributing_names_every_room_and_what_is_in_it():
    text, package = (ROOT / "CONTRIBUTING.md").read_text(), ROOT / "resfeat"
    rooms = re.findall(r"^\| `([\w./]+)` \| .* \| (.*) \|$", text, re.MULTILINE)
    there = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    there |= {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert {room for room, _ in rooms} == there
    for room, used in rooms:
        files = (package / room).rglob("*.py") if room.endswith("/") else [package / room]
        code = "\n".join(path.read_text() for path in files)
        for name in re.findall(r"`(\w+)`", used):
            assert re.search(rf"^(?:def|class) {name}\b|^{name} = ", code, re.MULTILINE), name
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert (package / path).exists(), path


def test_the_tests_that_the_table_of_faults_names_are_there():
    table = (ROOT / "tests" / "README.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", table)
    assert len(named) > 40
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in path.read_text() or not test, f"{file}::{test}"


def test_the_ci_script_is_what_a_person_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.splitlines()[-2:] == ["make test", "make test-more"]
    planned = subprocess.run(
        ["make", "-n", "demo", "test", "test-more"], cwd=ROOT, capture_output=True, text=True
    )
    assert planned.returncode == 0, planned.stderr
    for step in ("pipelines/demo.py demo", "ruff check .", "mypy", "-m pytest", "-m more"):
        assert step in planned.stdout
