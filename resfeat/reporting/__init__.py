"""What a run did, and what limits it."""

from resfeat.reporting.metrics import Metrics
from resfeat.reporting.preview import Preview, last_rate
from resfeat.reporting.report import ANY, Report, retried, versions
from resfeat.reporting.tally import Progress, Tally, Watch

__all__ = [
    "ANY",
    "Metrics",
    "Preview",
    "Progress",
    "Report",
    "Tally",
    "Watch",
    "last_rate",
    "retried",
    "versions",
]
