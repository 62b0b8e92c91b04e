"""A sample of a dataset's own images, spread evenly over its plan."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from resfeat.dataset import Layout, Record
from resfeat.decoding import CarefulDecoder, Loaded, load
from resfeat.plan import Plan, read_shard
from resfeat.sources import Item
from resfeat.spec import Decode, Preprocessing

# Images on which parity is measured, and on which int8 is calibrated. More of the latter make it
# slower and hardly better.
SAMPLE = 32
CALIBRATION = 128
# Items to draw for each picture, since some may not decode.
CANDIDATES = 4


def for_parity(layout: Layout, record: Record) -> list[Item]:
    """Items to measure parity on, the first to be used first."""
    is_int8 = record.identity.precision == "int8"
    return sample(layout, record.plan, SAMPLE + CALIBRATION if is_int8 else SAMPLE)


def for_calibration(layout: Layout, record: Record) -> list[Item]:
    """Items to calibrate int8 on. They are those of `for_parity`, taken from the other end: so int8
    is not measured on the images that it was calibrated on, if there are enough."""
    return sample(layout, record.plan, SAMPLE + CALIBRATION)[::-1]


def sample(layout: Layout, plan: Plan, wanted: int) -> list[Item]:
    """Items for about `wanted` pictures. The first ones are spread over the plan, too."""
    count = CANDIDATES * wanted
    shards = list(plan.shards.values())
    chosen = sorted({len(shards) * n // count for n in range(count)})
    each = -(-count // len(chosen))
    candidates: list[Item] = []
    for place in chosen:
        items = read_shard(layout.plan, shards[place])
        candidates += items[:: max(1, len(items) // each)][:each]
    stride = max(1, len(candidates) // wanted)
    return [item for start in range(stride) for item in candidates[start::stride]]


def pictures(
    items: Iterable[Item], preprocessing: Preprocessing, way: Decode, wanted: int
) -> list[NDArray[np.uint8]]:
    """The first `wanted` pictures, uint8 [crop, crop, 3], of the items that decode.

    A child process decodes them, so that none of them can end the run.
    """
    with CarefulDecoder(1) as decoder:
        return list(itertools.islice(_pixels(items, preprocessing, way, decoder), wanted))


def _pixels(
    items: Iterable[Item], preprocessing: Preprocessing, way: Decode, decoder: CarefulDecoder
) -> Iterator[NDArray[np.uint8]]:
    for item in items:
        loaded = load(item, preprocessing, way, decoder.decode)
        if isinstance(loaded, Loaded):
            yield loaded.picture.pixels
