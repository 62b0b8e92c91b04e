"""How near our embeddings are to the reference's, on real photographs.

    python tests/benchmarks/parity.py [--photos 18]

Writes three tables, with what each one compares, to PARITY.md beside this file.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torchvision.models import get_model_weights

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "pipelines")]

from photos import write_photos  # noqa: E402
from reference import torchvision_model  # noqa: E402

from resfeat import runtimes  # noqa: E402
from resfeat.backbones.ours import LIKE_TORCHVISION, default_pixels  # noqa: E402
from resfeat.decoding.decode import decode  # noqa: E402
from resfeat.fidelity.parity import cosine  # noqa: E402
from resfeat.fidelity.sample import CALIBRATION  # noqa: E402
from resfeat.runtimes import OFFERED, REFERENCE  # noqa: E402
from resfeat.runtimes.torch import TorchRuntime  # noqa: E402
from resfeat.spec import Identity  # noqa: E402

SOME = ("resnet18", "resnet50", "resnet152", "resnext50_32x4d")

INTRODUCTION = """\
# How near to the reference

`make parity`, on {photos} real photographs. Weights are random, with batch norms that change their
input: published weights would have to be downloaded, and would be the easier case.
"""
TORCHVISION = """\
## Our networks against torchvision's

From the file to the vector, with `--decode pillow`: torchvision's own transforms and model, and
ours. Differences of embeddings are relative to their largest value.
"""
PRECISION = """\
## Each precision against fp32 on torch

The same pixels through the same network, in every precision that a runtime offers on this machine.
int8 was calibrated on other photographs.
"""
DECODING = """\
## `--decode turbo` against `--decode pillow`

The photographs as JPEGs of three sizes. turbo decodes the larger two at a half or a quarter of
their size.
"""


def network(name):
    """torchvision's network without its classifier, and our identity and tensors for it."""
    theirs = torchvision_model(name, seed=0)
    theirs.fc = torch.nn.Identity()
    identity = Identity(model=name, weights_digest="", preprocessing=default_pixels(name))
    return theirs, identity, theirs.state_dict()


def pictures(paths, identity, way="pillow"):
    pixels = identity.preprocessing
    return np.stack([decode(path.read_bytes(), pixels, way).pixels for path in paths])


def against_torchvision(name, paths):
    """Largest differences: of pixels (0..255) and of embeddings, relative to the largest value."""
    theirs, identity, tensors = network(name)
    transforms = get_model_weights(name).DEFAULT.transforms()
    inputs = torch.stack([transforms(Image.open(path).convert("RGB")) for path in paths])
    pixels = pictures(paths, identity)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (transforms.mean, transforms.std))
    seen = (inputs * std + mean).mul(255).permute(0, 2, 3, 1).numpy()
    with torch.inference_mode():
        expected = torch.cat([theirs(x[None]) for x in inputs]).numpy()
    given = TorchRuntime(identity, tensors, "cpu").embed(pixels)
    levels = np.abs(pixels - np.rint(seen)).max()
    return levels, np.abs(given - expected).max() / np.abs(expected).max()


def against_fp32(name, runtime, precision, device, paths, others):
    """Cosines of one precision of one runtime to fp32 on torch; int8 is calibrated on others."""
    _, identity, tensors = network(name)
    pixels = pictures(paths, identity)
    expected = TorchRuntime(identity, tensors, "cpu").embed(pixels)
    identity = replace(identity, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        quantised = Path(folder, "network.xml")
        if precision == "int8":
            from resfeat.runtimes.openvino import quantise

            quantise(identity, tensors, lambda: list(pictures(others, identity)), quantised)
        prepared = runtimes.prepare(runtime, identity, tensors, quantised)
        started = runtimes.start(prepared, device=device, threads=1, batch_size=len(pixels))
        return cosine(started.embed(pixels), expected)


def turbo_against_pillow(paths):
    """Largest and mean difference of pixels (0..255), and the cosines that they lead to."""
    _, identity, tensors = network("resnet50")
    pillow, turbo = (pictures(paths, identity, way) for way in ("pillow", "turbo"))
    runtime = TorchRuntime(identity, tensors, "cpu")
    difference = np.abs(turbo.astype(int) - pillow)
    return difference.max(), difference.mean(), cosine(runtime.embed(turbo), runtime.embed(pillow))


def as_jpegs(paths, folder, size):
    """The photographs as JPEGs of one size."""
    folder.mkdir()
    written = []
    for path in paths:
        written.append(folder / f"{path.stem}.jpg")
        with Image.open(path) as photo:
            photo.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(written[-1])
    return written


def tables(paths, others, folder):
    """PARITY.md, line by line. others: photographs to calibrate int8 on."""
    yield INTRODUCTION.format(photos=len(paths))
    yield TORCHVISION
    yield "| model | pixels, largest difference of 255 | embeddings, largest relative difference |"
    yield "| --- | ---: | ---: |"
    for name in LIKE_TORCHVISION:
        levels, relative = against_torchvision(name, paths)
        yield f"| {name} | {levels:.0f} | {relative:.1e} |"
    yield ""
    yield PRECISION
    yield "| against fp32, torch, CPU | model | cosine, least | cosine, median |"
    yield "| --- | --- | ---: | ---: |"
    places = [("torch", "cpu"), ("openvino", "cpu")]
    places += [("torch", "cuda")] if torch.cuda.is_available() else []
    for runtime, device in places:
        for precision in OFFERED[runtime]:
            if (runtime, device, precision) == ("torch", "cpu", REFERENCE):
                continue
            for name in SOME:
                cosines = against_fp32(name, runtime, precision, device, paths, others)
                yield (
                    f"| {precision}, {runtime}, {device.upper()} | {name} | {cosines.min():.7f} "
                    f"| {np.median(cosines):.7f} |"
                )
    yield ""
    yield DECODING
    yield (
        "| `--decode turbo` against `pillow` | pixels, largest | pixels, mean "
        "| resnet50, cosine, least | median |"
    )
    yield "| --- | ---: | ---: | ---: | ---: |"
    for size in (500, 375), (1600, 1200), (4000, 3000):
        named = "{} x {}".format(*size)
        largest, mean, cosines = turbo_against_pillow(as_jpegs(paths, folder / named, size))
        yield (
            f"| JPEGs of {named} | {largest} | {mean:.3f} | {cosines.min():.7f} "
            f"| {np.median(cosines):.7f} |"
        )


@click.command()
@click.option("--photos", default=18, show_default=True, help="How many photographs to compare on.")
def main(photos: int) -> None:
    """Write PARITY.md."""
    with tempfile.TemporaryDirectory() as folder:
        every = write_photos(Path(folder), photos + CALIBRATION)
        lines = []
        for line in tables(every[:photos], every[photos:], Path(folder)):
            print(line, flush=True)
            lines.append(line)
    (HERE / "PARITY.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
