"""How near our embeddings are to the reference's, on real photographs: the tables of the README.

    python tests/benchmarks/parity.py [--photos 18]

The first table compares every network that torchvision has too with torchvision's own model and
transforms: pixels, and embeddings from the file to the vector. The second compares every precision
that a runtime offers on this machine with fp32 on torch. Weights are random, with batch norms that
do something: published ones cannot be had on a machine without a network, and would only be easier.
Both tables are written into README.md, between its markers.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torchvision.models import get_model_weights

ROOT = Path(__file__).parents[2]
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

            quantise(identity, tensors, list(pictures(others, identity)), quantised)
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
    yield "| model | pixels, largest difference of 255 | embeddings, largest relative difference |"
    yield "| --- | ---: | ---: |"
    for name in LIKE_TORCHVISION:
        levels, relative = against_torchvision(name, paths)
        yield f"| {name} | {levels:.0f} | {relative:.1e} |"
    yield ""
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
    """Write the tables into README.md."""
    with tempfile.TemporaryDirectory() as folder:
        every = write_photos(Path(folder), photos + CALIBRATION)
        lines = []
        for line in tables(every[:photos], every[photos:], Path(folder)):
            print(line, flush=True)
            lines.append(line)
    readme = ROOT / "README.md"
    marked = re.compile(r"(<!-- parity -->\n).*(<!-- /parity -->)", re.DOTALL)
    text, found = marked.subn(
        lambda match: match[1] + "\n".join(lines) + "\n" + match[2], readme.read_text()
    )
    assert found == 1, "README.md has lost its markers"
    readme.write_text(text)


if __name__ == "__main__":
    main()
