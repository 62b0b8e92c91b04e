"""The small JSON documents of a dataset."""

from __future__ import annotations

import json

from resfeat.dataset.layout import Layout
from resfeat.storage import Location, write_whole


def write_json(layout: Layout, location: Location, content: object) -> None:
    """Write a small JSON document into a dataset, whole or not at all."""
    write_whole(layout.tmp, location, (json.dumps(content, indent=2) + "\n").encode())


def read_json(location: Location) -> object:
    """A JSON document of a dataset; None where there is none, or none that can be read."""
    try:
        return json.loads(location.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
