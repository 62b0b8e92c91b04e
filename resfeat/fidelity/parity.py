"""Parity: how near the embeddings of a run are to the reference, torch in fp32 on a CPU.

If a run uses anything else, it embeds a sample of its images both ways, and commits nothing before
it knows how near they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from resfeat.dataset import Layout, Record
from resfeat.errors import ChoiceError
from resfeat.fidelity.sample import SAMPLE, for_parity, pictures
from resfeat.runtimes import REFERENCE
from resfeat.spec import Decode, Identity
from resfeat.worker import Placement

if TYPE_CHECKING:
    from torch import Tensor

# Images to compare in the reference's own precision, in place of SAMPLE: another runtime does the
# same arithmetic in another order, and a few images show whether it does.
SAMPLE_OF_REFERENCE = 4
BATCH = 8  # of the reference
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
    made = placement.runtime, placement.device, identity.precision
    return made != ("torch", "cpu", REFERENCE)


@dataclass(frozen=True)
class Reference:
    """Pictures, uint8 [H, W, 3] each, and their embeddings [N, D] by torch in fp32 on a CPU."""

    pictures: Sequence[NDArray[np.uint8]]
    embeddings: NDArray[np.float32]


def reference(layout: Layout, record: Record, tensors: Mapping[str, Tensor]) -> Reference | None:
    """Embed a sample of the dataset's images as the reference does.

    If none decodes, or all embeddings are zero or not finite: None for the reference's own
    precision, which then goes unmeasured, and ChoiceError for any other.
    """
    from resfeat.runtimes.torch import TorchRuntime

    identity, items = record.identity, for_parity(layout, record)
    wanted = SAMPLE_OF_REFERENCE if identity.precision == REFERENCE else SAMPLE
    # In fp32 any pictures will do. With Pillow the child process need not import torch for seconds.
    way: Decode = "pillow" if identity.precision == REFERENCE else identity.decode
    chosen = pictures(items, identity.preprocessing, way, wanted)
    why, ask = f"none of {len(items)} sampled images can be decoded", "are these images?"
    if chosen:
        runtime = TorchRuntime(replace(identity, precision=REFERENCE), tensors, "cpu")
        batches = [np.stack(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
        expected = np.concatenate([runtime.embed(batch) for batch in batches])
        sound = np.isfinite(expected).all(axis=1) & expected.any(axis=1)
        if sound.any():
            return Reference(list(itertools.compress(chosen, sound)), expected[sound])
        why = f"fp32 embeddings of {len(chosen)} sampled images are all zero or not finite"
        ask = "are these the right weights?"
    if identity.precision == REFERENCE:
        return None
    raise ChoiceError(
        f"{why}, so {identity.precision} cannot be compared with fp32: {ask} "
        "--precision fp32 does without"
    )


def compare(
    given: NDArray[np.float32], expected: Reference, identity: Identity, dims: Mapping[str, int]
) -> Parity | None:
    """How near embeddings [N, D], in the identity's stored type, are to the reference's.

    Rows with values that this type does not hold become failures, and are left out. If none is
    left: None for the reference's own precision, -1 for any other. dims: length of each layer.
    """
    with np.errstate(over="ignore"):
        stored = given.astype(identity.dtype).astype(np.float32)
    finite = np.isfinite(stored).all(axis=1)
    if not finite.any():
        return None if identity.precision == REFERENCE else Parity(0, -1.0, -1.0)
    bounds = np.cumsum(list(dims.values()))[:-1]
    ours = np.split(stored[finite], bounds, axis=1)
    theirs = np.split(expected.embeddings[finite], bounds, axis=1)
    every = np.concatenate(list(map(cosine, ours, theirs)))
    return Parity(int(finite.sum()), float(every.min()), float(np.median(every)))


def check(parity: Parity, identity: Identity, least: float | None) -> None:
    """Raise ChoiceError if the embeddings are too far from the reference."""
    least = LEAST.get(identity.precision, LEAST_OTHERWISE) if least is None else least
    if not parity.minimum >= least:
        raise ChoiceError(
            f"{identity.precision} embeddings of {parity.images} sampled images have a cosine of "
            f"{parity.minimum:.6f} to fp32's at the least (median {parity.median:.6f}), under "
            f"--min-parity {least:g}: use --precision fp32, or lower --min-parity"
        )


def cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row of `ours` [N, D] to that of `theirs`; not a number counts as -1."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        given = (a * b).sum(axis=1) / lengths
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both_zero, 1.0, np.nan_to_num(given, nan=-1.0))
