"""Who watches a run, and may stop it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands: images of the whole dataset, done and failed so far, live workers.

    While the sources are being listed `total` is None and `done` counts the images found.
    """

    total: int | None
    done: int
    failed: int
    workers: int


@dataclass(frozen=True)
class Watch:
    """What a run calls while it goes on.

    note: with what a user should know of how the run was set up; the report has it, too. step: with
    what is being done, before it takes long. progress: about twice a second. stopping: gives true
    once the run is to stop.
    """

    note: Callable[[str], None] = lambda text: None
    step: Callable[[str], None] = lambda text: None
    progress: Callable[[Progress], None] = lambda progress: None
    stopping: Callable[[], bool] = lambda: False
