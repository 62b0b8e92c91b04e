"""The demonstration: photographs, extract, read the rows back, look at nearest neighbours.

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
import pyarrow.dataset as ds
from photos import write_photos

from resfeat.backbones.weights import resolve
from resfeat.errors import ResfeatError
from resfeat.spec import FeatureSpec

MODEL = "resnet50"
QUERIES = 4


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=300, show_default=True)
def main(folder: Path, count: int) -> None:
    """Embed COUNT real photographs below FOLDER and show the result."""
    photos, output, sheet = folder / "photos", folder / "embeddings", folder / "nearest.png"
    for made_before in (photos, output):
        shutil.rmtree(made_before, ignore_errors=True)

    step(f"{count} photographs: crops of those that scikit-image and scikit-learn carry")
    written = write_photos(photos, count, long_side=640)

    step("Their embeddings")
    run("extract", photos, "-o", output, "--model", MODEL, "--weights", weights())

    step("The rows, read back with pyarrow")
    table = ds.dataset(output / "embeddings").to_table()
    print(table.schema.remove_metadata())
    first = table.slice(0, 1).to_pylist()[0]
    start = ", ".join(f"{value:.3f}" for value in first["embedding"][:5])
    print(f"{table.num_rows} rows; the first is {first['id']}: [{start}, ...]")

    step("The nearest neighbours of some of them")
    queries = written[:QUERIES]  # each of another photograph
    run("search", output, *queries, "-k", 6, "--sheet", sheet)
    print(f"\nDone. Look at {sheet}, and at the dataset in {output}.")


def weights() -> str:
    """DEFAULT if the pretrained weights can be had; otherwise random ones, and says so."""
    try:
        resolve(FeatureSpec(model=MODEL))
    except ResfeatError as error:
        print(f"The pretrained weights cannot be reached from here: {error}.")
        print("Going on with random weights (random:0). They see colours and textures, not things.")
        return "random:0"
    return "DEFAULT"


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
