"""What residual networks were made for: a deeper plain network is trained worse than a shallow one.

    python pipelines/degradation.py [--picture degradation.png] [--highway]
    python pipelines/degradation.py --cifar cifar-10-batches-bin --epochs 164 --device cuda

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2: plain
networks of 20 and 56 layers beside residual ones. They learn 1,400 of scikit-learn's handwritten
digits, enlarged to 32 x 32 pixels, in about ten minutes on two cores. --highway adds highway
networks (Srivastava, Greff, Schmidhuber, "Training Very Deep Networks", 2015), whose gates are a
third convolution in nearly every block. All are trained alike, and one seed gives one result on the
same machine and number of threads.

--cifar takes CIFAR-10 instead, in its "binary version": data_batch_1.bin to data_batch_5.bin and
test_batch.bin. The version for Python is pickles, which may run anything when they are read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional

from resfeat.backbones import build, numbers
from resfeat.backbones.ours import CIFAR_DEPTHS
from resfeat.backbones.pooling import pool
from resfeat.backbones.resnet import initialise

KINDS = {"plain": "plain", "resnet": "ResNet", "highway": "highway"}
CLASSES, SIDE = 10, 32
TESTED = 397  # digits, which leaves 1,400 to learn from
# As in the paper, but for the smaller batch, since there are few digits, and the rate, which rises
# and falls once instead of falling twice.
BATCH, RATE, MOMENTUM, DECAY = 64, 0.1, 0.9, 1e-4
PADDING = 4  # of CIFAR's pictures, for crops at random

Colour = tuple[int, int, int]
PANEL, MARGIN, GAP = (250, 220), 40, 20  # of the picture, in pixels
SHARPER = 3  # drawn so many times as large, for smooth lines
INK, FAINT, PAPER = (20, 20, 20), (225, 225, 225), (255, 255, 255)
COLOURS = {20: (0, 114, 178), 32: (0, 158, 115), 44: (150, 100, 160), 56: (213, 94, 0)}  # by depth


class Pictures(NamedTuple):
    pixels: Tensor  # float [N, 3, 32, 32], normalised
    classes: Tensor  # int [N]


class Task(NamedTuple):
    """What all networks are to learn, and how. moved: whether pictures are shifted and mirrored at
    random, as the paper does with CIFAR-10's; a mirrored digit is none."""

    train: Pictures
    test: Pictures
    moved: bool
    epochs: int
    seed: int


class Outcome(NamedTuple):
    """curve: training error of each epoch, while it learns. train, test: afterwards. All 0 to 1."""

    kind: str
    depth: int
    curve: list[float]
    train: float
    test: float
    seconds: float


class Network(nn.Module):
    """One of resfeat's networks for CIFAR-10, and the classifier that it leaves out."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = build(name, SIDE)
        initialise(self.backbone, seed)
        # Untrained residual networks are damped there to stay finite; nobody is to have a start.
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        self.fc = nn.Linear(numbers(name, SIDE).shapes(SIDE)["avgpool"][0], CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [N, classes] of pictures [N, 3, H, W]."""
        return self.fc(pool(self.backbone(pictures, ["avgpool"])["avgpool"], "avg"))


@click.command()
@click.option("--depths", default="20,56", show_default=True, help="Of 20, 32, 44, 56.")
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True)
@click.option("--images", type=click.IntRange(10), help="Learn from the first so many only.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--cifar", metavar="FOLDER", type=click.Path(path_type=Path), help="CIFAR-10's.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--highway", is_flag=True, help="Train highway networks, too.")
@click.option(
    "--picture", metavar="F.png", default="degradation.png", show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
)  # fmt: skip
def main(
    depths: str, epochs: int, images: int | None, seed: int, cifar: Path | None, device: str,
    highway: bool, picture: Path,
) -> None:  # fmt: skip
    """Train plain and residual networks; print and draw their training errors."""
    chosen = depths_of(depths)
    if picture.suffix != ".png" or not picture.absolute().parent.is_dir():
        sys.exit(f"--picture {picture}: give a path that ends in .png, in a folder that exists")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here: give --device cpu")
    train, test = cifar_10(cifar) if cifar else digits(seed)
    train = Pictures(*(part[:images] for part in train))
    data = [Pictures(*(part.to(device) for part in each)) for each in (train, test)]
    task = Task(*data, moved=cifar is not None, epochs=epochs, seed=seed)
    print(f"{len(train.classes):,} pictures to learn from and {len(test.classes):,} to be tested")
    print("training error in %, epoch by epoch:")
    outcomes = [learned(kind, depth, task) for kind in KINDS for depth in chosen
                if highway or kind != "highway"]  # fmt: skip
    print(f"\n{table(outcomes)}")
    try:
        drawn(outcomes).save(picture)
    except OSError as error:
        sys.exit(f"cannot write {picture}: {error}")
    print(f"Picture: {picture}")


def depths_of(text: str) -> list[int]:
    known = {str(depth): depth for depth in CIFAR_DEPTHS}
    if unknown := [each for each in text.split(",") if each not in known]:
        sys.exit(f"--depths {unknown[0]}: give some of {', '.join(known)}, as in 20,56")
    return sorted({known[each] for each in text.split(",")})


def digits(seed: int) -> tuple[Pictures, Pictures]:
    """Those to learn from and those to be tested, with the same share of each digit."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        sys.exit("scikit-learn has the digits, and is not installed: pip install 'resfeat[probe]'")
    there = load_digits()
    grey = torch.from_numpy(there.images).float()[:, None] / 16
    large = functional.interpolate(grey, size=SIDE, mode="bilinear").expand(-1, 3, -1, -1)
    split = train_test_split(
        np.arange(len(large)), test_size=TESTED, stratify=there.target, random_state=seed
    )
    classes = torch.from_numpy(there.target).long()
    return normalised(*(Pictures(large[rows], classes[rows]) for rows in split))


def cifar_10(folder: Path) -> tuple[Pictures, Pictures]:
    def read(*names: str) -> Pictures:
        """Records of 3,073 bytes: the class, then the red, the green and the blue pixels."""
        try:
            rows = [np.fromfile(folder / name, np.uint8).reshape(-1, 3 * SIDE**2 + 1)
                    for name in names]  # fmt: skip
        except (OSError, ValueError) as error:
            sys.exit(f"cannot read CIFAR-10 in {folder} ({error}): give the folder of its binary "
                     "version, with data_batch_1.bin")  # fmt: skip
        every = torch.from_numpy(np.concatenate(rows))
        return Pictures(every[:, 1:].reshape(-1, 3, SIDE, SIDE).float() / 255, every[:, 0].long())

    return normalised(read(*(f"data_batch_{n}.bin" for n in range(1, 6))), read("test_batch.bin"))


def normalised(train: Pictures, test: Pictures) -> tuple[Pictures, Pictures]:
    """By the mean and the spread of each colour in the pictures that are learned from."""
    spread, mean = torch.std_mean(train.pixels, dim=(0, 2, 3), keepdim=True)
    first, second = (Pictures((each.pixels - mean) / spread, each.classes)
                     for each in (train, test))  # fmt: skip
    return first, second


def learned(kind: str, depth: int, task: Task) -> Outcome:
    """Train one network, and say so in a line as it goes on."""
    print(f"{KINDS[kind]}-{depth}".ljust(11), end="", flush=True)
    started, pixels = time.perf_counter(), task.train.pixels
    network = Network(f"cifar_{kind}{depth}", task.seed).to(pixels.device)
    optimizer = torch.optim.SGD(network.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    steps = task.epochs * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    chance, curve = torch.Generator().manual_seed(task.seed), list[float]()
    for epoch in range(task.epochs):
        wrong = 0
        for pictures, classes in batches(task, chance):
            logits = network.train()(pictures)
            optimizer.zero_grad()
            functional.cross_entropy(logits, classes).backward()
            optimizer.step()
            schedule.step()
            wrong += int((logits.argmax(dim=1) != classes).sum())
        curve.append(wrong / len(pixels))
        if epoch * 10 // task.epochs != (epoch + 1) * 10 // task.epochs:  # ten of them are told
            print(f"{curve[-1]:>6.1%}".rstrip("%"), end=" ", flush=True)
    train, test = (error(network, each) for each in (task.train, task.test))
    seconds = time.perf_counter() - started
    print(f" then {train:.1%}, of others {test:.1%}, {seconds:.0f} s", flush=True)
    return Outcome(kind, depth, curve, train, test, seconds)


def batches(task: Task, chance: torch.Generator) -> Iterator[Pictures]:
    """Each picture once, in an order by chance."""
    for rows in torch.randperm(len(task.train.classes), generator=chance).split(BATCH):
        pixels = task.train.pixels[rows]
        yield Pictures(moved(pixels, chance) if task.moved else pixels, task.train.classes[rows])


def moved(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """Crops of padded pictures, every second one mirrored, about."""
    wide = functional.pad(pixels, [PADDING] * 4)
    tops, lefts = torch.randint(2 * PADDING + 1, (2, len(pixels)), generator=chance).tolist()
    mirrored = (torch.rand(len(pixels), generator=chance) < 0.5).tolist()
    crops = (each[:, top : top + SIDE, left : left + SIDE]
             for each, top, left in zip(wide, tops, lefts, strict=True))  # fmt: skip
    pairs = zip(crops, mirrored, strict=True)
    return torch.stack([crop.flip(2) if mirror else crop for crop, mirror in pairs])


@torch.inference_mode()
def error(network: Network, pictures: Pictures) -> float:
    """The share whose class is not the first guess."""
    guesses = [network.eval()(each).argmax(dim=1) for each in pictures.pixels.split(256)]
    return (torch.cat(guesses) != pictures.classes).double().mean().item()


def table(outcomes: Sequence[Outcome]) -> str:
    """In Markdown."""
    lines = ["| network | parameters | training error | test error | seconds |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for each in outcomes:
        count = numbers(f"cifar_{each.kind}{each.depth}", SIDE).parameter_count()
        lines.append(f"| {KINDS[each.kind]}-{each.depth} | {count:,} | {each.train:.1%} "
                     f"| {each.test:.1%} | {each.seconds:.0f} |")  # fmt: skip
    return "\n".join(lines)


def drawn(outcomes: Sequence[Outcome]) -> Image.Image:
    """A panel for each kind: the error of each epoch, from 0 to 100 %."""
    across, down = PANEL[0] + GAP, PANEL[1]
    kinds = list(dict.fromkeys(each.kind for each in outcomes))
    size = MARGIN + len(kinds) * across, 2 * MARGIN + down
    sheet = Image.new("RGB", tuple(SHARPER * each for each in size), PAPER)
    for number, kind in enumerate(kinds):
        shown = [each for each in outcomes if each.kind == kind]
        panel(sheet, (MARGIN + number * across, MARGIN), shown, with_scale=not number)
    return sheet.resize(size, Image.Resampling.BOX)


def panel(
    sheet: Image.Image, corner: tuple[int, int], shown: Sequence[Outcome], with_scale: bool
) -> None:
    """corner: its left and upper one, in pixels of the picture that the sheet will be."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11 * SHARPER)
    (left, top), (width, height) = corner, PANEL

    def line(points: Sequence[tuple[float, float]], ink: Colour, strength: int) -> None:
        """Through points (0 to 1 across, 0 to 1 up)."""
        places = [((left + width * x) * SHARPER, (top + height * (1 - y)) * SHARPER)
                  for x, y in points]  # fmt: skip
        draw.line(places, ink, strength * SHARPER, joint="curve")

    def write(x: float, y: float, text: str, anchor: str, ink: Colour = INK) -> None:
        draw.text((x * SHARPER, y * SHARPER), text, ink, font, anchor=anchor)

    write(left + width / 2, top - 14, KINDS[shown[0].kind], "mm")
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        line([(0, share), (1, share)], FAINT if share else INK, 1)
        if with_scale:
            write(left - 5, top + height * (1 - share), f"{share:.0%}", "rm")
    if with_scale:
        write(left, top + height + 14, "training error, by epoch", "lm")
    for row, each in enumerate(shown):
        ink, epochs = COLOURS[each.depth], len(each.curve)
        line([((n + 1) / epochs, share) for n, share in enumerate(each.curve)], ink, 2)
        text = f"{each.depth} layers, afterwards {each.train:.1%}"
        write(left + width - 6, top + 12 + 16 * row, text, "rm", ink)


if __name__ == "__main__":
    main()
