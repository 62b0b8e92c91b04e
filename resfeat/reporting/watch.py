"""Who watches a run, and may stop it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands: images of the whole dataset, done and failed so far, live workers. While
    the sources are listed, total is None and done counts the images found."""

    total: int | None
    done: int
    failed: int
    workers: int


@dataclass(frozen=True)
class Watch:
    """What a run tells and asks; `resfeat.extract` says what of each."""

    note: Callable[[str], None] = lambda text: None
    step: Callable[[str], None] = lambda text: None
    progress: Callable[[Progress], None] = lambda progress: None
    stopping: Callable[[], bool] = lambda: False
