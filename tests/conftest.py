"""What the tests share: real photographs, broken files, a checkpoint, and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken import write_broken
from photos import write_photos
from reference import torchvision_model

Run = Callable[..., "subprocess.CompletedProcess[str]"]

PHOTOS = 500


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 real photographs as JPEG, PNG and WebP, in one subfolder a subject. Not to be changed."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, PHOTOS, long_side=400)
    return folder


@pytest.fixture(scope="session")
def collection(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, nested deeper, with a dozen broken files among them. Not to be changed."""
    folder = tmp_path_factory.mktemp("collection")
    for photo in sorted(photos.rglob("*.*")):
        place = folder / "some" / photo.parent.name / "deeper" / photo.name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(photo, place)
    write_broken(folder / "some" / "chelsea")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchvision ResNet-18 state dict with lively batch norms, as a .pth file."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision_model("resnet18", seed=1).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def resfeat() -> Run:
    """Run the installed command: `resfeat("status", "out")` gives the finished process."""

    def run(*arguments: object, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "resfeat", *map(str, arguments)]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    return run
