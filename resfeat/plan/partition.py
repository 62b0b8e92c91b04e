"""Which of a dataset's shards a run does, where several share them out."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from resfeat.errors import UsageError

HINT = "give i/n, as in 2/4, or auto in a Slurm array, auto/n in an indexed job of Kubernetes"


@dataclass(frozen=True)
class Partition:
    """Every `of`-th shard. number: from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def share(self) -> str:
        """What its lock and its drafts are called."""
        return f"{self.number}-of-{self.of}"

    def has(self, shard: int) -> bool:
        return shard % self.of == self.number - 1

    @classmethod
    def of_share(cls, share: str) -> Self | None:
        """The inverse of `share`; None for that of a whole dataset."""
        found = re.fullmatch(r"(\d+)-of-(\d+)", share)
        return cls(int(found[1]), int(found[2])) if found else None

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Self:
        """Of what a user gives; "auto" takes it from the scheduler's variables. Raises
        UsageError."""
        number, _, of = text.partition("/")
        if number == "auto":
            number, of = _scheduled(environment, of)
        if not (number.isdecimal() and of.isdecimal()):
            raise UsageError(f"--partition {text}: {HINT}")
        if not 1 <= int(number) <= int(of):
            raise UsageError(
                f"--partition {number}/{of}: give a number from 1 to {of} before the /"
            )
        return cls(int(number), int(of))


def _scheduled(environment: Mapping[str, str], of: str) -> tuple[str, str]:
    """Which task this is, from 1, and of how many: of a Slurm array, of a Slurm step with several
    tasks, or of an indexed job of Kubernetes, which does not tell how many there are."""
    try:
        if "SLURM_ARRAY_TASK_ID" in environment:
            at, first, last, step = (
                int(environment[f"SLURM_ARRAY_TASK_{name}"])
                for name in ("ID", "MIN", "MAX", "STEP")
            )
            # Not the count: of an array with holes, or one that was submitted again in part, that
            # is less.
            return str((at - first) // step + 1), of or str((last - first) // step + 1)
        if "SLURM_PROCID" in environment:
            return str(int(environment["SLURM_PROCID"]) + 1), of or environment["SLURM_NTASKS"]
        if "JOB_COMPLETION_INDEX" in environment:
            return str(int(environment["JOB_COMPLETION_INDEX"]) + 1), of
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"--partition auto: the scheduler's variables lack {error}: {HINT}"
        ) from None
    raise UsageError(f"--partition auto: no scheduler's variables are here: {HINT}")
