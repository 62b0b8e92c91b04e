"""The demonstration: photographs, their embeddings, and what those are for.

    python pipelines/demo.py FOLDER [--count 300]

Everything is written below FOLDER, and replaces what an earlier demonstration left there. Each
command is printed before it runs.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import packaged
import pyarrow.dataset as ds
from photos import write_photos
from PIL import Image

from resfeat.backbones.weights import resolve
from resfeat.errors import ResfeatError
from resfeat.spec import FeatureSpec

MODEL = "resnet50"
QUERIES = 4
# Copies have cosines above this, and so have crops that share nearly all of a photograph.
SAME = 0.98


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=300, show_default=True)
def main(folder: Path, count: int) -> None:
    """Embed COUNT real photographs, and copies of one, below FOLDER and show what comes of it."""
    photos, output, sheet = folder / "photos", folder / "embeddings", folder / "nearest.png"
    for made_before in (photos, output):
        shutil.rmtree(made_before, ignore_errors=True)

    step(f"{count} photographs: crops of those that scikit-image and scikit-learn carry")
    written = write_photos(photos, count, long_side=640)
    copied = write_copies(written[0])
    print(f"and copies of {written[0].name}: {', '.join(each.name for each in copied)}")

    step("Their embeddings")
    run("extract", photos, "-o", output, *network(folder), "--label-from", "parent")

    step("The rows, read back with pyarrow")
    table = ds.dataset(output / "embeddings").to_table()
    print(table.schema.remove_metadata())
    first = table.slice(0, 1).to_pylist()[0]
    start = ", ".join(f"{value:.3f}" for value in first["embedding"][:5])
    print(f"{table.num_rows} rows; the first is {first['id']}: [{start}, ...]")

    step("The nearest neighbours of some of them")
    queries = written[:QUERIES]  # each of another photograph
    run("search", output, *queries, "-k", 6, "--sheet", sheet)

    step("Which are nearly the same")
    run("duplicates", output, "--threshold", SAME, "--html", folder / "duplicates.html")

    step("Which photograph is it a crop of? Learned from the labels, tested on other crops")
    run("probe", output, "--folds", 5, "--picture", folder / "confusion.png")

    step("All of it on one page")
    run("page", output, "-o", folder / "page.html")
    print(f"\nDone. Open {folder / 'page.html'}, look at {sheet}, and at the dataset in {output}.")


def write_copies(original: Path) -> list[Path]:
    """Copies of a photograph beside it, as they come about: one as it is, one saved again, and a
    smaller one."""
    copy, again, small = (
        original.with_name(f"{original.stem}_{how}.jpg") for how in ("copy", "again", "small")
    )
    shutil.copy(original, copy)
    with Image.open(original) as photo:
        photo.save(again, quality=85)
        photo.resize((photo.width * 3 // 4, photo.height * 3 // 4)).save(small, quality=90)
    return [copy, again, small]


def network(folder: Path) -> list[object]:
    """ResNet-50 if its pretrained weights can be had; otherwise a network whose weights a package
    carries, and says so."""
    print(f"waiting for the weights of {MODEL} ...", flush=True)
    try:
        resolve(FeatureSpec(model=MODEL))
    except ResfeatError as error:
        weights = folder / "imagenet.safetensors"
        packaged.write_weights(weights)
        print(f"{error}; the demo takes {packaged.MODEL} and the ImageNet weights of "
              f"{packaged.PACKAGE}")  # fmt: skip
        return ["--model", packaged.MODEL, "--weights", weights]
    return ["--model", MODEL]


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ resfeat {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "resfeat", *words], check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
