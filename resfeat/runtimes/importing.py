"""How torch is imported, where the time counts."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """While torch is imported: it makes objects by the hundred thousand, and Python would go over
    all of them several times to find no garbage, for a quarter of the import's time. Nor does it
    look at them later: they stay."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
