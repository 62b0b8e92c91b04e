"""Libraries that few tests use are imported by the first that does. Each process of pytest-xdist
collects all tests, and would import every library of every one before it begins with its own."""

from __future__ import annotations

import importlib
from typing import Any


class Later:
    """Stands for a module: `pandas = Later("pandas")`. Nothing can be set in it."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, what: str) -> Any:
        # pytest asks whatever stands in a test module for _mock_name and the like.
        if what.startswith(("__", "_mock", "_pytest")):
            raise AttributeError(what)
        return getattr(importlib.import_module(self._name), what)
