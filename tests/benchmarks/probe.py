"""What embeddings of digits are worth: by ImageNet weights and by chance, together, beside pixels.

    python tests/benchmarks/probe.py [--digits 1797] [--side 224]

scikit-learn's handwritten digits, 8 x 8 pixels, enlarged and embedded. Five folds, the same
for every row. Writes the table to PROBE.md beside this file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parents[1] / "pipelines")]

import packaged  # noqa: E402
from command import call  # noqa: E402
from labelled import invent  # noqa: E402

RAW, CHANCE, RESNET, IMAGENET = "raw pixels", "lite0, random", "resnet18, random", "lite0, ImageNet"
INTRODUCTION = """\
# What embeddings of digits are worth

`tests/benchmarks/probe.py --digits {count} --side {side}`: {count} of
scikit-learn's handwritten digits of 8 x 8 pixels, enlarged to {side} and embedded.
`resfeat probe --folds 5`: top-1 on images that were not learned from,
and its spread over the folds; top-1 from 1, 5 and 10 images of each digit, mean of 15 draws.
"lite0" is `{lite}`; ImageNet's are the weights of the package
`{package}`. "together" is lite0 with ImageNet weights beside resnet18.
"""
HEAD = """
| embeddings | dims | classifier | top-1 | spread | 1 a class | 5 a class | 10 a class |
| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |
"""


@click.command()
@click.option("--digits", default=1797, show_default=True, help="How many of them.")
@click.option("--side", default=224, show_default=True, help="Of the enlarged ones, in pixels.")
def main(digits: int, side: int) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        names, pixels = write_digits(Path("digits"), digits)
        invent(Path(RAW), names, pixels, weights="random:7")
        packaged.write_weights(Path("imagenet.safetensors"))
        embed(CHANCE, packaged.MODEL, "random:0", side)
        embed(IMAGENET, packaged.MODEL, "imagenet.safetensors", side)
        embed(RESNET, "resnet18", "random:0", side)
        rows = [*probe(RAW, RESNET)[:2], *probe(CHANCE), *probe(RESNET, IMAGENET, "--save", "p")]
        text = INTRODUCTION.format(
            count=digits, side=side, lite=packaged.MODEL, package=packaged.PACKAGE
        )
        text += HEAD
        text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
        (HERE / "PROBE.md").write_text(text + "\n" + "\n".join(applied(Path("digits"))) + "\n")
    print((HERE / "PROBE.md").read_text())


def write_digits(folder: Path, count: int) -> tuple[list[str], np.ndarray]:
    """The first ones as PNGs, in a folder each; their ids, and their pixels [count, 64]."""
    there, names = load_digits(), []
    for number, (pixels, digit) in enumerate(zip(there.images, there.target, strict=True)):
        if number < count:
            names.append(f"{digit}/{number:04}.png")
            (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / names[-1])
    return names, there.data[:count]


def embed(output: str, model: str, weights: str, side: int) -> None:
    started = time.perf_counter()
    # OpenVINO is asked for, since torch takes several times as long for networks of timm.
    told("extract", "digits", "-o", output, "--model", model, "--weights", weights, "--workers", 0,
         "--runtime", "openvino", "--resize", side, "--crop", side,
         "--label-from", "parent")  # fmt: skip
    print(f"{output}: {time.perf_counter() - started:.0f} s", flush=True)


def probe(*arguments: str) -> list[list[str]]:
    """The cells of each score."""
    scores = json.loads(told("probe", *arguments, "--folds", 5, "--json"))["scores"]
    shots = [[f"{score['few_shot'][n]:.4f}" for n in ("1", "5", "10")] for score in scores]
    return [
        [score["embeddings"], f"{score['dims']:,}", score["classifier"], f"{score['top1']:.4f}",
         f"{score['spread']:.4f}", *few] for score, few in zip(scores, shots, strict=True)
    ]  # fmt: skip


def applied(folder: Path) -> Iterator[str]:
    """What the saved probe, of both datasets, says of them, and of some files once more."""
    rows = json.loads(told("predict", "p", RESNET, IMAGENET, "--json"))
    by_id = {row["id"]: row for row in rows}
    files = [str(folder / name) for name in sorted(by_id)[::100]]
    again = json.loads(told("predict", "p", *files, "--json"))
    same = sum(row["label"] == by_id[os.path.relpath(row["id"], folder)]["label"] for row in again)
    right = sum(row["label"] == row["id"].partition("/")[0] for row in rows)
    yield f"The saved probe, which has learned from all, knows {right:,} of {len(rows):,} again,"
    yield f"and says of {same} of {len(again)} image files what it says of their rows."


def told(*arguments: object) -> str:
    done = call(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    main()
