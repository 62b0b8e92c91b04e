"""Parity: how near the embeddings of a run are to the reference, on the user's own images.

The reference is torch in fp32 on a CPU. Where a run uses anything else, a sample of its images is
embedded both ways before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from resfeat.errors import ChoiceError
from resfeat.fidelity.sample import pictures
from resfeat.runtimes import REFERENCE
from resfeat.runtimes.torch import TorchRuntime
from resfeat.sources.item import Item
from resfeat.spec import Decode, Identity
from resfeat.worker import Placement

# Images that are compared. In the reference's own precision a runtime does the same arithmetic in
# another order, and the first few show whether it does.
SAMPLE = 32
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
    here = placement.runtime, placement.device, identity.precision
    return here != ("torch", "cpu", REFERENCE)


@dataclass(frozen=True)
class Reference:
    """Pictures, uint8 [H, W, 3] each, and their embeddings [N, D] by torch in fp32 on a CPU."""

    pictures: Sequence[NDArray[np.uint8]]
    embeddings: NDArray[np.float32]


def reference(
    identity: Identity, tensors: Mapping[str, Tensor], items: Sequence[Item]
) -> Reference | None:
    """Embed the first images that decode as the reference does.

    Where none does, or the reference has nothing to say of those that do, the reference's own
    precision goes unmeasured (None), and any other raises ChoiceError.
    """
    wanted = SAMPLE_OF_REFERENCE if identity.precision == REFERENCE else SAMPLE
    # By Pillow alone, where any pictures will do: it spares the child process torch, seconds of it.
    way: Decode = "pillow" if identity.precision == REFERENCE else identity.decode
    chosen = pictures(items, identity.preprocessing, way, wanted)
    if not chosen:
        why = f"none of {len(items)} sampled images can be decoded"
        return _go_without(identity, why, "are these images?")
    runtime = TorchRuntime(replace(identity, precision=REFERENCE), tensors, "cpu")
    expected = np.concatenate(
        [runtime.embed(np.stack(chosen[i : i + BATCH])) for i in range(0, len(chosen), BATCH)]
    )
    # Where the reference gives nothing, there is nothing to compare.
    sound = np.isfinite(expected).all(axis=1) & expected.any(axis=1)
    if not sound.any():
        why = f"fp32 embeddings of {len(chosen)} sampled images are all zero or not finite"
        return _go_without(identity, why, "are these the right weights?")
    kept = [picture for picture, one in zip(chosen, sound, strict=True) if one]
    return Reference(kept, expected[sound])


def compare(
    given: NDArray[np.float32], expected: Reference, identity: Identity, dims: Mapping[str, int]
) -> Parity | None:
    """How near embeddings [N, D], once they are stored as the identity has it, are to the
    reference's. dims: the length of each layer.

    Values that the stored type does not hold become failure rows, so they are left out; None where
    nothing else is left and the precision is the reference's own.
    """
    with np.errstate(over="ignore"):
        stored = given.astype(identity.dtype).astype(np.float32)
    finite = np.isfinite(stored).all(axis=1)
    if not finite.any():
        return None if identity.precision == REFERENCE else Parity(0, -1.0, -1.0)
    bounds = np.cumsum(list(dims.values()))[:-1]
    layers = zip(
        np.split(stored[finite], bounds, axis=1),
        np.split(expected.embeddings[finite], bounds, axis=1),
        strict=True,
    )
    every = np.concatenate([cosine(ours, theirs) for ours, theirs in layers])
    return Parity(int(finite.sum()), float(every.min()), float(np.median(every)))


def _go_without(identity: Identity, why: str, ask: str) -> Reference | None:
    if identity.precision == REFERENCE:
        return None
    raise ChoiceError(
        f"{why}, so {identity.precision} cannot be compared with fp32: {ask} "
        "--precision fp32 does without"
    )


def check(parity: Parity, identity: Identity, least: float | None) -> None:
    """Raise ChoiceError where the embeddings are too far from the reference."""
    least = LEAST.get(identity.precision, LEAST_OTHERWISE) if least is None else least
    if not parity.minimum >= least:
        raise ChoiceError(
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
