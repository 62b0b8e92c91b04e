"""Calibration: the int8 network of a dataset, made once, on the dataset's own images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from resfeat.dataset import Layout, Record
from resfeat.errors import ChoiceError, ResfeatError
from resfeat.fidelity.sample import CALIBRATION, for_calibration, pictures
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
    from resfeat.runtimes.openvino import quantise  # seconds that a resume need not spend

    started = time.monotonic()
    items, identity = for_calibration(layout, record), record.identity
    chosen = pictures(items, identity.preprocessing, identity.decode, CALIBRATION)
    if not chosen:
        raise ChoiceError(
            f"none of {len(items)} sampled images can be decoded, so int8 cannot be calibrated: "
            "are these images? --precision fp32 needs no calibration"
        )
    layout.quantised.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="resfeat-") as folder:
        made = Path(folder, "network.xml")
        quantise(
            identity, weights.tensors, chosen, made, lambda used: on_picture(used, len(chosen))
        )
        for suffix in (".bin", ".xml"):
            content = made.with_suffix(suffix).read_bytes()
            write_whole(layout.tmp, layout.quantised.with_suffix(suffix), content)
    spent = time.monotonic() - started
    on_note(f"int8: calibrated on {len(chosen)} of the images in {spent:.0f} s")
    if record.quantised is None:
        record = replace(record, quantised=_digest(layout.quantised))
        record.save(layout)
    elif not is_intact(layout, record):
        raise ResfeatError(
            f"{layout.quantised} is gone or changed, and a new calibration gives another network: "
            "bring it back, or give a new -o"
        )
    return record


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
