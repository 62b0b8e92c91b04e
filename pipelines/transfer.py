"""Transfer learning, as people first use a ResNet: probe it, then fine-tune its last stage.

    python pipelines/transfer.py photos -o tuned.safetensors
    resfeat extract photos -o tuned --weights tuned.safetensors

photos has a subfolder for each class; it may be anything that `resfeat extract` takes, and classes
are the names of the images' folders. A fifth of each class is held out, and all figures are of it.

1. All stages but the last run once. What they give for each image (0.8 MB by ResNet-50) goes into a
   temporary file, so an epoch runs the last stage alone.
2. The probe: logistic regression on the embeddings, as `resfeat probe` does it.
3. Fine-tuning, with the probe for a classifier to begin with, so that it starts where the probe
   ends (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
   Out-of-Distribution", 2022). Batch norm keeps the means and variances that the weights came with,
   as `extract` has them; its scales and shifts are learned. No epoch is chosen by the figures.

What is saved is the whole network without a classifier, for `resfeat extract --weights`. A probe of
the images that it has learned from flatters it: it is for others of the same classes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from resfeat.backbones import build
from resfeat.backbones.pooling import pool
from resfeat.backbones.resnet import ResNet
from resfeat.backbones.weights import Weights, resolve
from resfeat.cli import shown
from resfeat.decoding import Loaded, load, quiet
from resfeat.downstream import check_place
from resfeat.downstream.learning import Classifier, Labelled, LeftOut, View, in_order
from resfeat.downstream.unit import unit
from resfeat.errors import Failure, ResfeatError, UsageError, first_line
from resfeat.sources import Item, listing
from resfeat.spec import FeatureSpec, SourceOptions
from resfeat.storage import write_whole

BATCH = 32
DECAY = 0.01
SUFFIX = ".safetensors"  # by which `extract` knows how to read it


class Images(NamedTuple):
    """maps: float32 [N, C, h, w], what the last stage sees of each image. which: int [N], the place
    of its class in `classes`. learned, held: the rows to learn from, and those held out."""

    maps: NDArray[np.float32]
    which: NDArray[np.intp]
    classes: tuple[str, ...]
    learned: NDArray[np.intp]
    held: NDArray[np.intp]


class Score(NamedTuple):
    what: str
    right: int  # images held out whose class was the first guess
    seconds: float


class Tuned(nn.Module):
    """The last stage of a network, and a probe of its embeddings for a classifier."""

    def __init__(self, stage: nn.Module, probe: Classifier) -> None:
        super().__init__()
        self.stage = stage
        self.weight = nn.Parameter(torch.from_numpy(probe.weight))
        self.bias = nn.Parameter(torch.from_numpy(probe.bias))

    def forward(self, maps: Tensor) -> Tensor:
        """Logits [N, classes] of what the stage before gave, [N, C, h, w]."""
        vectors = functional.normalize(pool(self.stage(maps), "avg"))  # the probe's are of length 1
        return functional.linear(vectors, self.weight, self.bias)


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@click.option(
    "-o", "--output", metavar="F.safetensors", default=f"tuned{SUFFIX}", show_default=True,
    type=click.Path(dir_okay=False, path_type=Path), help="Where to write the weights.",
)  # fmt: skip
@click.option("--model", default="resnet50", show_default=True, help="One of resfeat's ResNets.")
@click.option("--weights", default="DEFAULT", show_default=True, help="As of `resfeat extract`.")
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(0, 1, min_open=True), default=1e-4, show_default=True,
    help="Of learning, at most: it rises and falls once.",
)  # fmt: skip
@click.option(
    "--test", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2, show_default=True, help="Share of each class that is held out.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(
    sources: tuple[str, ...], output: Path, model: str, weights: str, epochs: int, rate: float,
    test: float, seed: int, device: str,
) -> None:  # fmt: skip
    """Probe a ResNet on the images of SRC, fine-tune its last stage on them, and save it."""
    try:
        check(output, device)
        items = several(list(listing(sources, SourceOptions(label_from="parent"))))
        found = resolve(FeatureSpec(model=model, weights=weights))
        network = network_of(found).to(device)
        with tempfile.TemporaryFile() as file:
            read, shape = run_once(network, found, items, file)
            maps = np.memmap(file, np.float32, "r", shape=(len(read), *shape))
            images = split(read, maps, test, seed)
            scores = transfer(network, images, epochs, rate, seed)
        write(output, network)
    except ResfeatError as error:
        print(f"Error: {shown(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"\n{'':<40}{'top-1':>8}{'right':>16}{'seconds':>9}")
    for what, right, seconds in scores:
        held = len(images.held)
        counts = f"{right:,} of {held:,}"
        print(f"{what:<40}{right / held:>8.4f}{counts:>16}{seconds:>9.1f}")
    print(f"\nWeights: {output}; embed with --model {model} --weights {output}")


def check(output: Path, device: str) -> None:
    """Raise UsageError now for what would be found hours later."""
    import resfeat.downstream.learning.probe  # noqa: F401 (says so where scikit-learn is missing)

    if output.suffix != SUFFIX:
        raise UsageError(f"-o {output}: give a path that ends in {SUFFIX}")
    check_place(str(output))
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here: give --device cpu")


def several(items: Sequence[Item]) -> list[Item]:
    """The images of classes that have two or more; who is left out is told. Raises UsageError where
    less than two classes have."""
    counts = Counter(str(item.label) for item in items)
    alone = in_order(name for name, count in counts.items() if count == 1)
    if len(counts) - len(alone) < 2:
        raise UsageError(
            f"{len(items):,} images in {len(counts):,} folders, and not two folders with two or "
            "more: give a folder with a subfolder for each class, and several images in each"
        )
    if alone:
        print(f"left out: {shown(str(LeftOut(0, 0, alone)))}")
    return [item for item in items if counts[str(item.label)] > 1]


def network_of(weights: Weights) -> ResNet:
    identity = weights.identity
    network = build(identity.model, identity.preprocessing.crop)
    if not isinstance(network, ResNet):
        raise UsageError(
            f"--model {identity.model}: give one of resfeat's own, which `resfeat models` lists, "
            "since others have no stages that are known"
        )
    network.load_state_dict(weights.tensors, strict=False)  # counts of training batches are missing
    return network


@torch.inference_mode()
def run_once(
    network: ResNet, weights: Weights, items: Sequence[Item], file: BinaryIO
) -> tuple[list[Item], tuple[int, ...]]:
    """Write what the last stage sees of each image into a file, float32 [N, C, h, w], and give the
    images and [C, h, w]. Images that cannot be read are told and left out."""
    before, identity, started = network.stages[-2], weights.identity, time.perf_counter()
    print(f"{len(items):,} images: running {identity.model} up to {before} ...", flush=True)
    pixels, device = identity.preprocessing, next(network.parameters()).device
    mean, std = (torch.tensor(each, device=device).view(1, 3, 1, 1)
                 for each in (pixels.mean, pixels.std))  # fmt: skip
    read, unread, shape = list[Item](), list[str](), ()
    for some in decoded(items, weights):
        good = {item: each.picture.pixels for item, each in some if isinstance(each, Loaded)}
        unread += [f"{item.id}: {each.reason}, {each.message}" for item, each in some
                   if isinstance(each, Failure)]  # fmt: skip
        if good:
            batch = torch.from_numpy(np.stack([*good.values()])).to(device)
            pictures = (batch.permute(0, 3, 1, 2).float() / 255 - mean) / std
            # The last stage does not run, since nobody asks for its map.
            maps = next(each for name, each in network.feature_maps(pictures) if name == before)
            if not read:
                size = len(items) * maps[0].nbytes / 1e6
                print(f"their maps: {size:,.0f} MB, for now in {tempfile.gettempdir()} (TMPDIR)",
                      flush=True)  # fmt: skip
            keep(file, maps.cpu().numpy().tobytes())
            read += good
            shape = tuple(maps.shape[1:])
    if not read:
        raise UsageError(f"none of the {len(items):,} images can be read, such as {unread[0]}")
    if unread:
        print(f"left out: {len(unread):,} unreadable, such as {shown(unread[0])}")
    print(f"{len(read):,} images read, {time.perf_counter() - started:.1f} s")
    return read, shape


def decoded(
    items: Sequence[Item], weights: Weights
) -> Iterator[list[tuple[Item, Loaded | Failure]]]:
    """The images, a batch at a time."""
    pixels, way = weights.identity.preprocessing, weights.identity.decode
    with ThreadPoolExecutor() as threads, quiet():
        for start in tqdm(range(0, len(items), BATCH), unit="batch", leave=False, disable=None):
            some = items[start : start + BATCH]
            pictures = threads.map(lambda item: load(item, pixels, way), some)
            yield list(zip(some, pictures, strict=True))


def keep(file: BinaryIO, content: bytes) -> None:
    try:
        file.write(content)
        file.flush()  # or what does not fit would be noticed when it is read
    except OSError as error:
        raise ResfeatError(
            f"cannot keep maps in {tempfile.gettempdir()}: {first_line(error)}; set TMPDIR to a "
            "folder that has room for them"
        ) from error


def split(items: Sequence[Item], maps: NDArray[np.float32], test: float, seed: int) -> Images:
    """Hold out this share of each class, and at least one image."""
    classes = in_order({str(item.label) for item in several(items)})
    place = {name: number for number, name in enumerate(classes)}
    which = np.array([place.get(str(item.label), -1) for item in items])
    learned, held, chance = [], [], np.random.default_rng(seed)
    for number in range(len(classes)):
        rows = chance.permutation(np.flatnonzero(which == number))
        count = min(max(round(test * len(rows)), 1), len(rows) - 1)
        held.append(rows[:count])
        learned.append(rows[count:])
    return Images(maps, which, classes, np.concatenate(learned), np.concatenate(held))


def transfer(
    network: ResNet, images: Images, epochs: int, rate: float, seed: int
) -> tuple[Score, Score, Score]:
    """Probe, fine-tune the last stage of the network, and probe what it gives then."""
    stage = getattr(network, network.stages[-1])
    learned, held = len(images.learned), len(images.held)
    print(f"probing: {learned:,} images to learn from, {held:,} held out ...", flush=True)
    probe, before = probed(stage, images, "probe of the embeddings")
    started, tuned = time.perf_counter(), Tuned(stage, probe)
    tuned.to(next(stage.parameters()).device)
    optimizer = torch.optim.AdamW(tuned.parameters(), rate, weight_decay=DECAY)
    steps = epochs * -(-learned // BATCH)
    # It rises at first: a probe's weights are large, and a large step would undo what it knows.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, cycle_momentum=False)
    chance = np.random.default_rng(seed)
    # In eval mode, as it was built: batch norm keeps its means and variances.
    for epoch in range(1, epochs + 1):
        total = 0.0
        for maps, which in batches(images, chance.permutation(images.learned), tuned):
            loss = functional.cross_entropy(tuned(maps), which)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(which)
        right, seconds = right_of(tuned, images), time.perf_counter() - started
        print(f"epoch {epoch} of {epochs}: loss {total / learned:.4f}, top-1 {right / held:.4f}, "
              f"{seconds:.1f} s", flush=True)  # fmt: skip
    told = f"{network.stages[-1]} fine-tuned, with its classifier"
    after = probed(stage, images, "probe of the embeddings it gives now")[1]
    return before, Score(told, right, seconds), after


@torch.inference_mode()
def probed(stage: nn.Module, images: Images, what: str) -> tuple[Classifier, Score]:
    """A probe of the embeddings that the last stage gives, and how it does."""
    from resfeat.downstream.learning.probe import learn

    started = time.perf_counter()

    def vectors(rows: NDArray[np.intp]) -> NDArray[np.float32]:
        parts = [pool(stage(maps), "avg").cpu() for maps, _ in batches(images, rows, stage)]
        return unit(torch.cat(parts).numpy())

    learned, held = vectors(images.learned), vectors(images.held)
    view = View(what, "", "", "", "", learned.shape[1])
    which, nobody = images.which[images.learned], LeftOut(0, 0, ())
    probe = learn(Labelled((view,), images.classes, which, learned, nobody))
    guesses, _ = probe.decide([probe.share(0, held)])
    right = int((guesses == images.which[images.held]).sum())
    return probe, Score(what, right, time.perf_counter() - started)


@torch.inference_mode()
def right_of(tuned: Tuned, images: Images) -> int:
    """How many of the images that were held out it knows."""
    every = batches(images, images.held, tuned)
    return sum(int((tuned(maps).argmax(dim=1) == which).sum()) for maps, which in every)


def batches(
    images: Images, rows: NDArray[np.intp], module: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps and classes of these rows, where the module is."""
    device = next(module.parameters()).device
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        both = images.maps[some], images.which[some]
        maps, which = (torch.from_numpy(each).to(device) for each in both)
        yield maps, which


def write(output: Path, network: ResNet) -> None:
    tensors = {name: each.cpu().contiguous() for name, each in network.state_dict().items()}
    try:
        write_whole(output.absolute().parent, output.absolute(), save(tensors))
    except OSError as error:
        raise ResfeatError(f"cannot write {output}: {first_line(error)}; make room") from error


if __name__ == "__main__":
    main()
