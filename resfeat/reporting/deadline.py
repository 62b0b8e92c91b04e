"""Whether the time that a scheduler gives a run is enough for a shard, told while it can be helped.

It is no reason to end the run: the speed may rise, and so may the limit of a job that has begun.
"""

import os
import time
from collections.abc import Mapping


def shortage(soonest: float, environment: Mapping[str, str] = os.environ) -> str | None:
    """What to tell the user where the first shard is done in `soonest` seconds, at the earliest,
    and Slurm ends the job before; None where it does not, or does not say."""
    told = environment.get("SLURM_JOB_END_TIME", "")
    left = float(told) - time.time() if told.isdecimal() else 0.0
    if not 0 < left < soonest:  # one whose end is over is another job's, or may go on
        return None
    return (
        f"no shard will be done in the time of this job, at this speed: the first takes "
        f"{soonest / 60:,.1f} more minutes, and {left / 60:,.1f} are left: give the job more "
        "--time, or a new output with a smaller --shard-size"
    )
