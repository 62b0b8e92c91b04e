"""Datasets that several tests read, made once by the command itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def choices(checkpoint) -> list[str]:
    """What decides the embeddings in these tests."""
    features = ["--model", "resnet18", "--weights", str(checkpoint)]
    return [*features, "--decode", "pillow", "--label-from", "parent"]


@pytest.fixture(scope="session")
def inline(collection, choices, resfeat, tmp_path_factory) -> Path:
    """The collection, extracted in one undisturbed process. Not to be changed."""
    output = tmp_path_factory.mktemp("inline") / "out"
    done = resfeat("extract", collection, "-o", output, "--workers", 0, *choices)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def copied(collection, tmp_path) -> Path:
    """A collection of one's own, to take files away from."""
    folder = tmp_path / "copied"
    shutil.copytree(collection, folder, symlinks=True, copy_function=_link, dirs_exist_ok=True)
    return folder


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
