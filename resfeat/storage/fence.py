"""Objects that only the holder of a lease may write."""

from collections.abc import Callable
from dataclasses import dataclass

from resfeat.errors import StoreError
from resfeat.storage.remote import StorePath

# Whoever else holds the lease writes an object once; more than a few times would be no accident.
ATTEMPTS = 5


def _passes() -> None:
    """Where nobody holds a lease."""


@dataclass
class Fence:
    """Keeps what a former holder of a lease sends from replacing what its successor wrote.

    check: raises where the lease is not ours. A write looks at what is there, then checks, and then
    replaces just that. If the lease goes to another after the check, for the process was paused or
    the request is slow, then one of two things is true when the request arrives. The other has
    written that object: the request is refused. Or it has not: then its own write is refused,
    since the object is not what it looked at, and it writes again, over ours.
    """

    check: Callable[[], None] = _passes

    def write(self, target: StorePath, content: bytes) -> None:
        """Raises what `check` raises, and StoreError where the store is out of reach."""
        for _ in range(ATTEMPTS):
            version = target.version()
            self.check()
            if target.swap(content, version) if version else target.create(content):
                return
        raise StoreError(
            f"{target}: another process writes it all the time; find it, and give the same "
            "command again"
        )
