"""Do edited photographs find their original? By ImageNet weights, by chance, and without a network.

    python tests/benchmarks/edits.py [FOLDER] [--originals 60]

The gallery is tiles, none of which overlaps another, of the photographs of pipelines/photos.py
and of those in FOLDER. Some are edited in nine ways, each mildly and strongly. What is edited is
not in the gallery: of the tiles there, the one that it was should be nearest to it. Writes the
table to EDITS.md beside this file.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from scipy.fft import dctn
from scipy.spatial.distance import cdist

import resfeat

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "pipelines"))

import packaged  # noqa: E402
from photos import photographs  # noqa: E402

# Of a tile, in pixels, and of a photograph, in tiles along each side.
LEAST, MOST = 80, 8
SIDE = 2048  # of a photograph, in pixels: larger ones are scaled down
# Levels of grey (standard deviation). Flatter tiles are sky or night, and equal to each other.
FLAT = 12

Edit = Callable[[Image.Image], Image.Image]
Find = Callable[[Sequence[Image.Image]], np.ndarray]


def cropped(share: float) -> Edit:
    """Off the middle, so that what is left lies elsewhere."""

    def edit(photo: Image.Image) -> Image.Image:
        width, height = (round(side * share) for side in photo.size)
        return photo.crop((0, 0, width, height))

    return edit


def resized(share: float) -> Edit:
    return lambda photo: photo.resize([round(side * share) for side in photo.size])


def recompressed(quality: int) -> Edit:
    def edit(photo: Image.Image) -> Image.Image:
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return edit


def recoloured(saturation: float, brightness: float) -> Edit:
    return lambda photo: ImageEnhance.Brightness(
        ImageEnhance.Color(photo).enhance(saturation)
    ).enhance(brightness)


def rotated(degrees: float) -> Edit:
    return lambda photo: photo.rotate(degrees, Image.Resampling.BICUBIC)


def blurred(share: float) -> Edit:
    return lambda photo: photo.filter(ImageFilter.GaussianBlur(share * min(photo.size)))


def captioned(share: float) -> Edit:
    """White letters on black across the foot."""

    def edit(photo: Image.Image) -> Image.Image:
        photo, high = photo.copy(), round(photo.height * share)
        draw = ImageDraw.Draw(photo)
        draw.rectangle((0, photo.height - high, photo.width, photo.height), "black")
        font = ImageFont.load_default(size=high * 0.7)
        draw.text((4, photo.height - high), "Summer sale 50 %", "white", font)
        return photo

    return edit


def greyed(photo: Image.Image) -> Image.Image:
    return ImageOps.grayscale(photo).convert("RGB")


# By kind: mild and strong, each with its strength in words.
EDITS: dict[str, tuple[tuple[str, Edit], tuple[str, Edit]]] = {
    "crop": (("80 % of each side", cropped(0.8)), ("50 %", cropped(0.5))),
    "resize": (("to a half", resized(0.5)), ("to a fifth", resized(0.2))),
    "recompression": (("JPEG, quality 30", recompressed(30)), ("5", recompressed(5))),
    "colour": (
        ("saturation x 1.5, brightness x 1.2", recoloured(1.5, 1.2)),
        ("x 3, x 0.5", recoloured(3, 0.5)),
    ),
    "flip": (("left to right", ImageOps.mirror), ("upside down", ImageOps.flip)),
    "rotation": (("by 5 degrees, black corners", rotated(5)), ("by 30", rotated(30))),
    "blur": (("Gauss, 1 % of the short side", blurred(0.01)), ("4 %", blurred(0.04))),
    "grey": (
        ("no colour", greyed),
        ("and equalised", lambda photo: ImageOps.equalize(greyed(photo))),
    ),
    "text": (("over a sixth, at the foot", captioned(1 / 6)), ("over a third", captioned(1 / 3))),
}  # fmt: skip


def scaled(path: Path) -> Image.Image:
    """A photograph, so large at most that its tiles are little larger than what networks take."""
    with Image.open(path) as photo:
        photo.thumbnail((SIDE, SIDE))
        return photo.convert("RGB")


def tiles(photo: Image.Image) -> list[Image.Image]:
    """A grid of them, without the flat ones."""
    across, down = (max(1, min(MOST, side // LEAST)) for side in photo.size)
    width, height = photo.width // across, photo.height // down
    cut = (
        photo.crop((left, top, left + width, top + height))
        for top in range(0, down * height, height)
        for left in range(0, across * width, width)
    )
    return [tile for tile in cut if np.std(ImageOps.grayscale(tile)) >= FLAT]


def pixels(photo: Image.Image) -> np.ndarray:
    return np.asarray(photo.convert("RGB").resize((32, 32), Image.Resampling.BOX), float).ravel()


def histogram(photo: Image.Image) -> np.ndarray:
    """Shares of 8 x 8 x 8 colours."""
    levels = np.asarray(photo.convert("RGB")).reshape(-1, 3) // 32
    counts = np.bincount(levels @ [64, 8, 1], minlength=512)
    return counts / counts.sum()


def perceptual_hash(photo: Image.Image) -> np.ndarray:
    """64 bits: which of the lowest frequencies of 32 x 32 levels of grey are above their median."""
    grey = ImageOps.grayscale(photo).resize((32, 32), Image.Resampling.BOX)
    lowest = dctn(np.asarray(grey, float))[:8, :8].ravel()
    return lowest > np.median(lowest)


# What needs no network: vectors, and how far apart they are.
PLAIN = {
    "raw pixels": (pixels, "euclidean"),
    "colour histogram": (histogram, "cityblock"),
    "perceptual hash": (perceptual_hash, "hamming"),
}


def by_vectors(gallery: Sequence[Image.Image], chosen: Sequence[int], name: str) -> Find:
    """How surely each of the chosen tiles is found by an edit of it: 1, or its share of those that
    are equally near."""
    make, metric = PLAIN[name]
    there = np.array([make(tile) for tile in gallery])

    def find(edited: Sequence[Image.Image]) -> np.ndarray:
        far = cdist(np.array([make(photo) for photo in edited]), there, metric)
        nearest = far <= far.min(axis=1, keepdims=True) + 1e-9
        return nearest[range(len(chosen)), chosen] / nearest.sum(axis=1)

    return find


def by_network(folder: Path, chosen: Sequence[int], model: str, weights: str) -> Find:
    """The same by resfeat, of the tiles in a folder."""
    output = folder.with_name(f"by {Path(weights).name}")
    # OpenVINO is asked for, since torch takes several times as long for networks of timm.
    resfeat.extract(folder, output, model=model, weights=weights, workers=0, runtime="openvino")
    dataset, embed = resfeat.open_dataset(output), resfeat.Embedder.of(output)
    names = [name_of(number) for number in chosen]

    def find(edited: Sequence[Image.Image]) -> np.ndarray:
        found = resfeat.nearest(dataset, embed(edited), k=1)
        return (found.ids[:, 0] == names).astype(float)

    return find


def name_of(number: int) -> str:
    return f"{number:05}.png"


def measure(
    gallery: Sequence[Image.Image], chosen: Sequence[int], networks: dict[str, tuple[str, str]],
    folder: Path,
) -> list[list[str]]:  # fmt: skip
    """The rows of the table: recall@1 of each edit, by each way to find. networks: model and
    weights, by name."""
    source = folder / "tiles"
    source.mkdir()
    for number, tile in enumerate(gallery):
        tile.save(source / name_of(number))
    ways = {name: by_network(source, chosen, *each) for name, each in networks.items()}
    ways |= {name: by_vectors(gallery, chosen, name) for name in PLAIN}
    rows, every = [["edit", "strength", *ways]], []
    for kind, strengths in EDITS.items():
        for words, edit in strengths:
            edited = [edit(gallery[number]) for number in chosen]
            every.append([float(find(edited).mean()) for find in ways.values()])
            rows.append([kind, words, *(f"{recall:.2f}" for recall in every[-1])])
            print(*rows[-1], sep="  ", flush=True)
    for name, some in (("mild", every[::2]), ("strong", every[1::2])):
        rows.append(["all nine", name, *(f"{recall:.2f}" for recall in np.mean(some, axis=0))])
    return rows


INTRODUCTION = """\
# Edited photographs find their original

`tests/benchmarks/edits.py`: the gallery is {gallery:,} tiles, none of which overlaps another, of
{photographs} photographs ({source}).
They are small, about 80 to 256 pixels, and many are parts of one thing, and so much alike.
{chosen} of them, drawn at random, were edited, each in all ways. What was edited is not in the
gallery. Recall@1: the share whose nearest tile, of all, is the one that they were. Of several that
are equally near, the right one counts its share.

"ImageNet" is `{model}` with the weights of the package
`{package}`, and "random" the same network with `random:0`, both through
`resfeat.Embedder` and `resfeat.nearest`, by cosine. Raw pixels are 32 x 32 in RGB, by L2; the
histogram has 8 x 8 x 8 colours, by L1; the hash has 64 bits, of a cosine transform, by Hamming's
distance. With {chosen} of them a figure of 0.50 is sure to within about {sure:.2f}.

"""


def written(rows: Sequence[Sequence[str]]) -> str:
    """As a table of Markdown."""
    rule = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("--originals", default=60, show_default=True, help="How many tiles to edit.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "EDITS.md")
def main(folder: Path | None, originals: int, out: Path) -> None:
    photos, source = list(photographs().values()), "of scikit-image and scikit-learn"
    if folder:
        more = [scaled(path) for path in sorted(folder.iterdir())]
        photos, source = photos + more, f"{source}, and {len(more)} of a folder"
    gallery = [tile for photo in photos for tile in tiles(photo)]
    chosen = sorted(random.Random(0).sample(range(len(gallery)), originals))
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name, "imagenet.safetensors")
        packaged.write_weights(weights)
        networks = {
            "ImageNet": (packaged.MODEL, str(weights)),
            "random": (packaged.MODEL, "random:0"),
        }
        table = written(measure(gallery, chosen, networks, Path(name)))
    text = INTRODUCTION.format(
        gallery=len(gallery), photographs=len(photos), source=source, chosen=len(chosen),
        model=packaged.MODEL, package=packaged.PACKAGE, sure=len(chosen) ** -0.5,
    )  # fmt: skip
    out.write_text(text + table)
    print(text + table)


if __name__ == "__main__":
    main()
