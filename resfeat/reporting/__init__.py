"""What a run did, and what limits it."""

from resfeat.reporting.report import Report, versions
from resfeat.reporting.tally import Progress, Tally, Watch

__all__ = ["Progress", "Report", "Tally", "Watch", "versions"]
