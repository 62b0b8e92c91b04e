"""Real photographs without a download: crops of those that scikit-image and scikit-learn carry.

    python pipelines/photos.py FOLDER [--count 300]

One subfolder a photograph; JPEG, PNG and WebP in turn. The same call writes the same pictures.
"""

from __future__ import annotations

import random
from pathlib import Path

import click
from PIL import Image

SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg",
                "motorcycle_left.png", "retina.jpg", "rocket.jpg")  # fmt: skip
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
SUFFIXES = (".jpg", ".png", ".webp")
SEED = 0


def photographs() -> dict[str, Image.Image]:
    """The whole photographs, RGB, by name."""
    import skimage
    import sklearn.datasets

    of_image = Path(skimage.__file__).parent / "data"
    of_learn = Path(sklearn.datasets.__file__).parent / "images"
    paths = [of_image / name for name in SCIKIT_IMAGE] + [of_learn / name for name in SCIKIT_LEARN]
    return {path.stem: Image.open(path).convert("RGB") for path in paths}


def write_photos(
    folder: Path, count: int, *, long_side: int | None = None, compress_level: int = 6
) -> list[Path]:
    """Write `count` crops below `folder`, and give their paths.

    A crop takes 40 to 90 % of each side of its photograph; where `long_side` is given it is scaled
    to that many pixels. compress_level: of PNG, from 0, the quickest, to 9, the smallest.
    """
    chance = random.Random(SEED)
    whole = photographs()
    names = sorted(whole)
    written = []
    for number in range(count):
        turn, subject = divmod(number, len(names))
        name, suffix = names[subject], SUFFIXES[turn % len(SUFFIXES)]
        crop = _crop(whole[name], chance)
        if long_side:
            crop.thumbnail((long_side, long_side))
        path = folder / name / f"{number:05d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, compress_level=compress_level)
        written.append(path)
    return written


def _crop(photo: Image.Image, chance: random.Random) -> Image.Image:
    width, height = (round(side * chance.uniform(0.4, 0.9)) for side in photo.size)
    left = chance.randint(0, photo.width - width)
    top = chance.randint(0, photo.height - height)
    return photo.crop((left, top, left + width, top + height))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=300, show_default=True)
def main(folder: Path, count: int) -> None:
    """Write COUNT real photographs below FOLDER."""
    write_photos(folder, count)
    print(f"wrote {count} photographs below {folder}")


if __name__ == "__main__":
    main()
