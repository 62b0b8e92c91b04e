"""A sample of a dataset's own images, spread evenly over its plan."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resfeat.dataset import Layout, Record
from resfeat.decoding import CarefulDecoder, Loaded, loaded
from resfeat.plan import Plan, read_shard
from resfeat.sources import Item, read_ahead
from resfeat.spec import Decode, Preprocessing

SAMPLE = 32  # images on which parity is measured
CALIBRATION = 128  # images for int8: more make it slower and hardly better
CANDIDATES = 4  # items to draw for each picture, since some may not decode


def for_parity(layout: Layout, record: Record) -> list[Item]:
    """Items to measure parity on, the first to be used first."""
    is_int8 = record.identity.precision == "int8"
    return sample(layout, record.plan, SAMPLE + CALIBRATION if is_int8 else SAMPLE)


def for_calibration(layout: Layout, record: Record) -> list[Item]:
    """Items to calibrate int8 on: those of `for_parity` from the other end, so that int8 is not
    measured on the images that it was calibrated on, if there are enough."""
    return for_parity(layout, record)[::-1]


def sample(layout: Layout, plan: Plan, wanted: int) -> list[Item]:
    """Items for about `wanted` pictures. The first ones are spread over the plan, too."""
    count, shards = CANDIDATES * wanted, list(plan.shards.values())
    chosen = sorted({len(shards) * n // count for n in range(count)})
    each = -(-count // len(chosen))
    candidates: list[Item] = []
    for place in chosen:
        items = read_shard(layout.plan, shards[place])
        candidates += items[:: max(1, len(items) // each)][:each]
    stride = max(1, len(candidates) // wanted)
    return [item for start in range(stride) for item in candidates[start::stride]]


def pictures(
    items: Sequence[Item], preprocessing: Preprocessing, way: Decode, wanted: int
) -> list[NDArray[np.uint8]]:
    """The first `wanted` pictures, uint8 [crop, crop, 3]. A child process decodes them, so that
    none can end the run."""
    with CarefulDecoder(1) as decoder:
        contents = read_ahead(items, wanted)
        images = (loaded(each, preprocessing, way, decoder.decode) for each in contents)
        good = (each.picture.pixels for each in images if isinstance(each, Loaded))
        return list(itertools.islice(good, wanted))
