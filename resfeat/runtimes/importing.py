"""How torch and pyarrow are imported, where the time counts."""

import gc
import importlib
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


def keep_pandas_out() -> None:
    """Have pyarrow, where it is not in use yet, believe that pandas is not installed. At its first
    array it imports pandas, for half a second, and an extraction has nothing for it to do. Not
    in a process that runs other people's code later: that may want pandas from pyarrow."""
    if "pyarrow" in sys.modules:
        return
    pyarrow, hidden = importlib.import_module("pyarrow"), _Hidden()
    sys.meta_path.insert(0, hidden)
    try:
        pyarrow.array([0])
    finally:
        sys.meta_path.remove(hidden)


class _Hidden:
    """Has Python not find pandas."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)
