"""Datasets that several tests read, made once by the command itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from broken import write_broken
from seams import UNHURRIED, after_import
from small import QUICK, write_pictures

SMALL = ["--resize", "36", "--crop", "32"]


@pytest.fixture(scope="session")
def choices(checkpoint) -> list[str]:
    """What decides the embeddings in these tests. Small pictures take a twentieth of the time, and
    OpenVINO two seconds to convert the network; what is tested depends on neither."""
    features = ["--model", "resnet18", "--weights", str(checkpoint), *SMALL]
    return [*features, "--decode", "pillow", "--label-from", "parent", "--runtime", "torch"]


@pytest.fixture(scope="session")
def unhurried(tmp_path_factory) -> dict[str, str]:
    """The environment of a run that lasts seconds, to be disturbed on its way."""
    sources = {"resfeat.decoding.decode": UNHURRIED}
    return after_import(sources, tmp_path_factory.mktemp("unhurried"))


@pytest.fixture(scope="session")
def extracted(once, resfeat):
    """Make a dataset once for all tests: `extracted("name", source, *options)` gives its folder.
    Not to be changed by who gets it."""

    def make(name, *arguments, code=0) -> Path:
        def write(folder):
            done = resfeat("extract", *arguments, "-o", folder / "out")
            assert done.returncode == code, done.stderr

        return once(name, write) / "out"

    return make


@pytest.fixture(scope="session")
def inline(collection, choices, extracted) -> Path:
    """The collection, extracted in one undisturbed process. Not to be changed."""
    return extracted("inline", collection, "--workers", 0, *choices)


@pytest.fixture(scope="session")
def original(photos, once) -> Path:
    """Seventy photographs and the broken files. Not to be changed."""

    def write(folder):
        for photo in sorted(photos.rglob("*.*"))[::7][:70]:
            shutil.copy2(photo, folder / f"{photo.parent.name}-{photo.name}")
        write_broken(folder)

    return once("few", write)  # which is their label


@pytest.fixture(scope="session")
def undisturbed(original, choices, extracted) -> Path:
    """The same in three shards, by one undisturbed process. Not to be changed."""
    options = [*choices, "--shard-size", 32, "--max-error-rate", 1]
    return extracted("few-extracted", original, "--workers", 0, *options)


@pytest.fixture(scope="session")
def some(once) -> Path:
    """A few small pictures: nine shards by QUICK. Not to be changed."""
    return once("some", lambda folder: write_pictures(folder, 72))


@pytest.fixture(scope="session")
def serial(some, extracted) -> Path:
    """The same, extracted in one undisturbed process. Not to be changed."""
    return extracted("some-extracted", some, *QUICK, "--workers", 0)


@pytest.fixture
def copied(collection, tmp_path) -> Path:
    """A collection of one's own, to take files away from."""
    folder = tmp_path / "copied"
    shutil.copytree(collection, folder, symlinks=True, copy_function=_link, dirs_exist_ok=True)
    return folder


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
