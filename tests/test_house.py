"""The house: imports go down, rooms keep to what is theirs, and nothing grows out of hand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import resfeat

ROOT = Path(resfeat.__file__).parent
# From the top: nothing imports what stands above it.
ROOMS = ["cli", "extraction", "run", "engines", "downstream", "reporting", "fidelity", "worker",
         "dataset", "plan", "runtimes", "backbones", "decoding", "sources", "storage",
         "keywords", "spec", "errors"]  # fmt: skip
# The same of the rooms in that of downstream.
DOWNSTREAM = ["page", "duplicates", "learning", "export", "index", "pictures", "search",
              "embedder", "unit"]  # fmt: skip
# The way in, for programs and for `python -m resfeat`: they may see all.
DOORS = ("__init__", "__main__")
ONLY_THERE = {"ray": "engines", "click": "cli"}
MOST_MODULES, MOST_LINES, MOST_PARAMETERS = 6, 350, 6
MODULES = sorted(ROOT.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path, house: Path = ROOT) -> str:
    """The folder, or the module of the top level, that a file belongs to."""
    return path.relative_to(house).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports, also inside functions."""
    package = ["resfeat", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{each.name}") for each in node.names)


def going_up(path: Path, house: str, rooms: list[str]) -> list[str]:
    """Imports of a file in a house, a package, that go to a room above its own."""
    here, wrong = room(path, ROOT.parent / house.replace(".", "/")), []
    assert here in (*rooms, *DOORS), f"{here} is no room of {house}: see ROOMS and DOWNSTREAM"
    for line, name in imported(path):
        if here in DOORS or not f"{name}.".startswith(f"{house}.") or name == "resfeat.__version__":
            continue
        there = name.removeprefix(house).removeprefix(".").partition(".")[0]
        if there not in rooms:
            wrong.append(f"{line}: {name} goes round by the front door")
        elif rooms.index(there) < rooms.index(here):
            wrong.append(f"{line}: {there} stands above {here}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_go_down_and_only_where_they_may(path):
    here, wrong = room(path), going_up(path, "resfeat", ROOMS)
    if here == "downstream":
        wrong += going_up(path, "resfeat.downstream", DOWNSTREAM)
    for line, name in imported(path):
        package = name.partition(".")[0]
        if package in ONLY_THERE and here != ONLY_THERE[package]:
            wrong.append(f"{line}: {package} belongs to {ONLY_THERE[package]}/")
    assert wrong == []


def test_the_imports_are_seen():
    """Those in functions, and relative ones: a test that sees none finds nothing wrong."""
    seen = {name for path in (ROOT / "cli").glob("*.py") for _, name in imported(path)}
    assert {"click", "resfeat.extraction", "resfeat.errors.ResfeatError"} <= seen
    every = {name.split(".")[0] for path in MODULES for _, name in imported(path)}
    assert {"ray", "torch", "pyarrow", "numpy"} <= every


def test_extract_takes_along_nothing_of_what_comes_after():
    """What it imports, and what that imports, by their names."""
    files = {path.relative_to(ROOT.parent).with_suffix("").as_posix(): path for path in MODULES}
    by_name = {
        name.replace("/", ".").removesuffix(".__init__"): path for name, path in files.items()
    }
    seen, left = set(), ["resfeat.cli.extract", "resfeat.extraction"]
    while left:
        name = left.pop()
        # The package itself imports its names when they are used.
        if name in seen or name not in by_name or name == "resfeat":
            continue
        seen.add(name)
        for _, each in imported(by_name[name]):
            left += [each, each.rpartition(".")[0]]
    assert {"resfeat.worker.shard", "resfeat.dataset.reader"} <= seen
    assert [name for name in seen if name.startswith("resfeat.downstream")] == []


def test_the_top_level_is_six_modules():
    assert len([named(path) for path in ROOT.glob("*.py")]) <= MOST_MODULES


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_files_and_lists_of_parameters_are_short(path):
    text = path.read_text()
    long = [
        f"{node.name} has {count} parameters"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (room(path) == "cli" and is_command(node))
        and (count := parameters(node)) > MOST_PARAMETERS
    ]
    if (lines := len(text.splitlines())) > MOST_LINES:
        long.append(f"{lines} lines")
    assert long == []


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many it takes, without `self` and `cls`."""
    given = function.args
    names = [each.arg for each in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    names += [each.arg for each in (given.vararg, given.kwarg) if each]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Click calls it, with an argument for each option."""
    decorators = (ast.unparse(each) for each in function.decorator_list)
    return any(each.startswith(("click.command", "click.group")) for each in decorators)
