"""Calibration: the int8 network of a dataset, made once, on the dataset's own images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from resfeat.dataset import Layout, Record
from resfeat.errors import ChoiceError, ResfeatError
from resfeat.fidelity.sample import CALIBRATION, for_calibration, pictures
from resfeat.sources import Item
from resfeat.spec import Identity
from resfeat.storage import Location, write_whole

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights


def calibrate(
    layout: Layout,
    record: Record,
    weights: Weights,
    on_note: Callable[[str], None],
    on_picture: Callable[[int, int], None] = lambda used, wanted: None,
) -> Record:
    """Make the dataset's int8 network, unless it is there and intact.

    on_picture: is told how many pictures have been used, and how many will be; it may raise.
    Returns the record with the network's digest in it. Raises ChoiceError if no image can be
    used, ResfeatError if a lost network cannot be made again as it was.
    """
    if is_intact(layout, record):
        return record
    started = time.monotonic()
    with TemporaryDirectory(prefix="resfeat-") as folder:
        made = Path(folder, "network.xml")
        items = for_calibration(layout, record)
        used = _quantise(made, items, record.identity, weights, on_picture)
        layout.quantised.parent.mkdir(exist_ok=True)
        for suffix in (".bin", ".xml"):
            content = made.with_suffix(suffix).read_bytes()
            write_whole(layout.tmp, layout.quantised.with_suffix(suffix), content)
    spent = time.monotonic() - started
    on_note(f"int8: calibrated on {used} of the images in {spent:.0f} s")
    if record.quantised is None:
        record = replace(record, quantised=_digest(layout.quantised))
        record.save(layout)
    elif not is_intact(layout, record):
        raise ResfeatError(
            f"{layout.quantised} is gone or changed, and a new calibration gives another network: "
            "bring it back, or give a new -o"
        )
    return record


def _quantise(
    network: Path,
    items: Sequence[Item],
    identity: Identity,
    weights: Weights,
    on_picture: Callable[[int, int], None],
) -> int:
    """Write an int8 network that is calibrated on the first of these items that can be decoded.
    Returns how many they were."""

    def chosen() -> list[NDArray[np.uint8]]:
        if found := coming.result():
            return found
        raise ChoiceError(
            f"none of {len(items)} sampled images can be decoded, so int8 cannot be calibrated: "
            "are these images? --precision fp32 needs no calibration"
        )

    with ThreadPoolExecutor(1, "pictures") as aside:
        coming = aside.submit(pictures, items, identity.preprocessing, identity.decode, CALIBRATION)
        # This takes seconds too, which a resume need not spend.
        from resfeat.runtimes.openvino import quantise

        quantise(identity, weights.tensors, chosen, network, on_picture)
    return len(coming.result())


def is_intact(layout: Layout, record: Record) -> bool:
    """Whether the int8 network is there, and is the one that the dataset was made with."""
    return _digest(layout.quantised) == record.quantised


def _digest(network: Location) -> str:
    """SHA-256 over both files of a network; empty if one is missing."""
    try:
        both = b"".join(network.with_suffix(suffix).read_bytes() for suffix in (".xml", ".bin"))
    except FileNotFoundError:
        return ""
    return hashlib.sha256(both).hexdigest()
