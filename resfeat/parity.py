"""Parity: how near the embeddings of a run are to the reference, on the user's own images.

The reference is torch in fp32 on a CPU. Where a run uses anything else, a sample of its images is
embedded both ways before it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from resfeat.errors import ResfeatError
from resfeat.job import Placement
from resfeat.runtimes import REFERENCE, Runtime
from resfeat.runtimes.torch import TorchRuntime
from resfeat.sample import pictures
from resfeat.sources.item import Item
from resfeat.spec import Identity
from resfeat.worker import Worker

# Images that are compared. In the reference's own precision a runtime does the same arithmetic in
# another order, and the first few show whether it does.
SAMPLE = 32
SAMPLE_OF_REFERENCE = 4
LEAST = {"int8": 0.99}
LEAST_OTHERWISE = 0.999


@dataclass(frozen=True)
class Parity:
    """Cosines between embeddings and the reference's, over `images` images and all their layers."""

    images: int
    minimum: float
    median: float


def differs(identity: Identity, placement: Placement) -> bool:
    """Whether workers placed like this make anything but the reference's embeddings."""
    here = placement.runtime, placement.device, identity.precision
    return here != ("torch", "cpu", REFERENCE)


def measure(worker: Worker, tensors: dict[str, Tensor], items: Sequence[Item]) -> Parity | None:
    """Embed the first images that decode with the worker's model and with the reference.

    Where none decodes, or the reference has nothing to say of those that do, the reference's own
    precision goes unmeasured (None), and any other raises ResfeatError.
    """
    identity = worker.job.identity
    wanted = SAMPLE_OF_REFERENCE if identity.precision == REFERENCE else SAMPLE
    chosen = pictures(items, identity, wanted)
    if not chosen:
        why = f"none of {len(items)} sampled images can be decoded"
        return _go_without(identity, why, "are these images?")
    reference = TorchRuntime(replace(identity, precision=REFERENCE), tensors, "cpu")
    with np.errstate(over="ignore"):
        given = _embed(worker, worker.runtime, chosen).astype(identity.dtype).astype(np.float32)
    expected = _embed(worker, reference, chosen)
    # Where the reference gives nothing, there is nothing to compare.
    sound = np.isfinite(expected).all(axis=1) & expected.any(axis=1)
    if not sound.any():
        why = f"fp32 embeddings of {len(chosen)} sampled images are all zero or not finite"
        return _go_without(identity, why, "are these the right weights?")
    bounds = np.cumsum(list(worker.job.dims.values()))[:-1]
    layers = zip(
        np.split(given[sound], bounds, axis=1),
        np.split(expected[sound], bounds, axis=1),
        strict=True,
    )
    every = np.concatenate([cosine(ours, theirs) for ours, theirs in layers])
    return Parity(int(sound.sum()), float(every.min()), float(np.median(every)))


def _go_without(identity: Identity, why: str, ask: str) -> Parity | None:
    if identity.precision == REFERENCE:
        return None
    raise ResfeatError(
        f"{why}, so {identity.precision} cannot be compared with fp32: {ask} "
        "--precision fp32 does without"
    )


def _embed(
    worker: Worker, runtime: Runtime, chosen: Sequence[NDArray[np.uint8]]
) -> NDArray[np.float32]:
    """Embeddings of pictures, in the batches, threads and so number of cores of the run."""
    size = worker.placement.batch_size
    batches = []
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        batch = runtime.empty((size, *some[0].shape))
        batch[: len(some)] = some
        batches.append(worker.forwards.submit(runtime.embed, batch))
    return np.concatenate([batch.result() for batch in batches])[: len(chosen)]


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
