"""A sample of a dataset's own images, spread evenly over its plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from resfeat.dataset import Layout
from resfeat.decoding.careful import CarefulDecoder
from resfeat.decoding.decode import Picture
from resfeat.errors import Failure
from resfeat.plan import Plan, read_shard
from resfeat.sources import read
from resfeat.sources.item import Item
from resfeat.spec import Decode, Preprocessing

# Items that are drawn for each picture that is wanted, since some may give none.
CANDIDATES = 4


def sample(layout: Layout, plan: Plan, wanted: int) -> list[Item]:
    """Items for about `wanted` pictures, in an order that spreads the first ones, too."""
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
    """The first `wanted` pictures, uint8 [crop, crop, 3], of the items that give one.

    Decoded in a child process: none of them may end the run.
    """
    with CarefulDecoder(1) as decoder:
        return list(itertools.islice(_pixels(items, preprocessing, way, decoder), wanted))


def _pixels(
    items: Iterable[Item], preprocessing: Preprocessing, way: Decode, decoder: CarefulDecoder
) -> Iterator[NDArray[np.uint8]]:
    for item in items:
        content = read(item.uri)
        if not isinstance(content, Failure):
            picture = decoder.decode(content[0], preprocessing, way)
            if isinstance(picture, Picture):
                yield picture.pixels
