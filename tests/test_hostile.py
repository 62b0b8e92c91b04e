"""Listing, reading and decoding whatever may lie in a folder: one right outcome for each file.

It is a process of its own that does so, twice: a decoder that crashes or hangs then fails a test
and not the tests, and what it costs can be measured. The second goes the other way round, so a
file that changes what becomes of its neighbours does not go unnoticed either.
"""

from __future__ import annotations

import hashlib
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hostile import Outcomes
from PIL import Image

from resfeat.decoding import decode, pillow
from resfeat.errors import REASONS, Failure
from resfeat.sources import listing, read
from resfeat.spec import Preprocessing

WAYS = ("turbo", "pillow")
MOST_SECONDS, MOST_MB = 2, 512
PREPROCESSING = Preprocessing(
    resize=232,
    crop=224,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


class Result(NamedTuple):
    """reason: None of a picture. digest: of its pixels. grown: the peak of memory, in MB, by."""

    way: str
    id: str
    reason: str | None
    digest: str
    seconds: float
    grown: float


def sweep(folder: str, order: int) -> list[Result]:
    """List, read and decode all of the folder, in this very process."""
    torch.set_num_threads(1)
    results = []
    for way in WAYS:
        for item in list(listing([folder]))[::order]:
            before, began = _peak(), time.process_time()
            content = read(item)
            answer = content
            if not isinstance(content, Failure):
                answer = decode(content[0], PREPROCESSING, way)
            seconds = time.process_time() - began
            if isinstance(answer, Failure):
                reason, digest = answer.reason, ""
            else:
                assert answer.pixels.shape == (224, 224, 3)
                reason, digest = None, hashlib.sha256(answer.pixels.tobytes()).hexdigest()
            results.append(Result(way, item.id, reason, digest, seconds, _peak() - before))
    return results


def _peak() -> float:
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@pytest.fixture(scope="module")
def expected_and_swept(
    hostile_files: tuple[Path, dict[str, Outcomes]],
) -> tuple[dict[str, Outcomes], list[list[Result]]]:
    folder, expected = hostile_files
    swept = []
    for order in ("1", "-1"):
        child = subprocess.run(
            [sys.executable, "-X", "faulthandler", __file__, folder, order],
            capture_output=True,
            text=True,
            timeout=300,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        assert child.returncode == 0, child.stderr[-2000:]
        swept.append([Result(*each) for each in json.loads(child.stdout)])
    return expected, swept


@pytest.mark.parametrize("way", WAYS)
def test_every_file_has_one_outcome_and_a_right_one(expected_and_swept, way):
    expected, (results, _) = expected_and_swept
    given = [(each.id, each.reason) for each in results if each.way == way]
    assert len(given) == len(expected) > 150
    assert set(dict(given)) == set(expected)
    assert {reason for _, reason in given} <= {None, *REASONS}
    assert [each for each in given if each[1] not in expected[each[0]]] == []


def test_two_runs_agree_to_the_last_bit_in_whatever_order(expected_and_swept):
    _, runs = expected_and_swept
    first, second = (sorted(each[:4] for each in results) for results in runs)
    assert first == second


def test_no_file_takes_long_or_much_memory(expected_and_swept):
    """The peak only ever grows, so what all files add to it is what the worst of them does."""
    _, runs = expected_and_swept
    for results in runs:
        slowest = max(results, key=lambda result: result.seconds)
        assert slowest.seconds < MOST_SECONDS, slowest
        largest = max(results, key=lambda result: result.grown)
        assert sum(result.grown for result in results) < MOST_MB, largest


@pytest.mark.parametrize("size", [(250, 400), (700, 300), (150, 700)])
@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16"])
@pytest.mark.parametrize("turn", [1, 3, 6, 7, 8])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_converted_in_bands_has_the_same_pixels(way, turn, mode, size, monkeypatch):
    """So that a large picture, which takes less memory in this way, is treated as any other."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    picture = Image.fromarray(noise).convert("RGB" if mode == "P" else "RGBA")
    if mode == "I;16":
        picture = Image.fromarray(noise.view(np.uint16)[..., 0])
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.convert(mode).save(buffer, "PNG", exif=exif)
    whole = decode(buffer.getvalue(), PREPROCESSING, way)
    monkeypatch.setattr(pillow, "BAND", 9_999)
    banded = decode(buffer.getvalue(), PREPROCESSING, way)
    assert np.array_equal(banded.pixels, whole.pixels)
    upright = size[::-1] if turn > 4 else size
    assert (banded.width, banded.height) == (whole.width, whole.height) == upright


if __name__ == "__main__":
    print(json.dumps(sweep(sys.argv[1], int(sys.argv[2]))))
