"""Images that are (nearly) the same."""

from resfeat.downstream.duplicates.groups import (
    Group,
    duplicate_tiles,
    find_duplicates,
    write_groups,
)
from resfeat.downstream.duplicates.links import Links

__all__ = ["Group", "Links", "duplicate_tiles", "find_duplicates", "write_groups"]
