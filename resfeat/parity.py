"""Parity: how near the embeddings of a run are to the reference, on the user's own images.

The reference is torch in fp32 on the CPU. Where a run uses anything else, a sample of its images is
embedded both ways before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from resfeat import plan
from resfeat.decode import Picture, decode
from resfeat.errors import Failure, ResfeatError
from resfeat.layout import Layout
from resfeat.runtimes import REFERENCE
from resfeat.runtimes.torch import TorchRuntime
from resfeat.sources.directory import read
from resfeat.sources.item import Item
from resfeat.spec import Identity
from resfeat.worker import Worker

# Images that are compared, and how many may fail to decode until there are so many.
SAMPLE = 32
CANDIDATES = 4 * SAMPLE
LEAST = {"int8": 0.99}
LEAST_OTHERWISE = 0.999


@dataclass(frozen=True)
class Parity:
    """Cosines between embeddings and the reference's, over `images` images and all their layers."""

    images: int
    minimum: float
    median: float


def differs(identity: Identity) -> bool:
    """Whether a run that makes these embeddings is anything but the reference."""
    return identity.precision != REFERENCE


def sample(layout: Layout, shards: int) -> list[Item]:
    """Items spread evenly over the plan, more than are needed since some may be broken."""
    chosen = sorted({shards * n // CANDIDATES for n in range(CANDIDATES)})
    each = -(-CANDIDATES // len(chosen))
    candidates: list[Item] = []
    for shard in chosen:
        items = plan.read_shard(layout, shard)
        candidates += items[:: max(1, len(items) // each)][:each]
    # In an order that spreads the first ones, too, since only those are used where all are whole.
    return [item for start in range(4) for item in candidates[start::4]]


def measure(worker: Worker, tensors: dict[str, Tensor], items: Sequence[Item]) -> Parity:
    """Embed the first `SAMPLE` images that decode with the worker's model and with the reference.

    Raises ResfeatError where none does.
    """
    identity, size = worker.job.identity, worker.placement.batch_size
    pictures = list(_pictures(items, identity))
    if not pictures:
        raise ResfeatError(
            f"none of {len(items)} sampled images can be decoded, so {identity.precision} cannot "
            "be compared with fp32: are these images? --precision fp32 needs no comparison"
        )
    reference = TorchRuntime(replace(identity, precision=REFERENCE), tensors, "cpu")
    crop = identity.preprocessing.crop
    bounds = np.cumsum(list(worker.job.dims.values()))[:-1]
    images, cosines = 0, []
    for start in range(0, len(pictures), size):
        batch = np.zeros((size, crop, crop, 3), np.uint8)
        some = pictures[start : start + size]
        batch[: len(some)] = some
        # In the thread, and so with the number of cores, that the run will use.
        given, expected = (
            worker.forwards.submit(runtime.embed, batch).result()[: len(some)]
            for runtime in (worker.runtime, reference)
        )
        # Where the reference gives nothing, there is nothing to compare.
        sound = np.isfinite(expected).all(axis=1) & expected.any(axis=1)
        with np.errstate(over="ignore"):
            given = given[sound].astype(identity.dtype).astype(np.float32)
        images += int(sound.sum())
        layers = zip(
            np.split(given, bounds, axis=1), np.split(expected[sound], bounds, axis=1), strict=True
        )
        cosines += [cosine(ours, theirs) for ours, theirs in layers]
    every = np.concatenate(cosines)
    if not images:
        raise ResfeatError(
            f"fp32 embeddings of {len(pictures)} sampled images are all zero or not finite, so "
            f"{identity.precision} cannot be compared with them: are these the right weights?"
        )
    return Parity(images, float(every.min()), float(np.median(every)))


def check(parity: Parity, identity: Identity, least: float | None) -> None:
    """Raise ResfeatError where the embeddings are too far from the reference."""
    least = LEAST.get(identity.precision, LEAST_OTHERWISE) if least is None else least
    if not parity.minimum >= least:
        raise ResfeatError(
            f"{identity.precision} embeddings of {parity.images} sampled images have a cosine of "
            f"{parity.minimum:.6f} to fp32's at the least (median {parity.median:.6f}), under "
            f"--min-parity {least:g}: use --precision fp32, or lower --min-parity"
        )


def cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row [N, D] of the one to that of the other; not a number counts as -1."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        given = (a * b).sum(axis=1) / lengths
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both_zero, 1.0, np.nan_to_num(given, nan=-1.0))


def _pictures(items: Sequence[Item], identity: Identity) -> Iterator[NDArray[np.uint8]]:
    found = 0
    for item in items:
        content = read(item.uri)
        picture = (
            content if isinstance(content, Failure) else decode(content[0], identity.preprocessing)
        )
        if isinstance(picture, Picture):
            yield picture.pixels
            found += 1
        if found == SAMPLE:
            return
