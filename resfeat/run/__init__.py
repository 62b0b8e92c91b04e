"""One run: the output folder held, the plan made, resumed or updated, what is left behind."""

from resfeat.run.planning import previewed
from resfeat.run.request import Request
from resfeat.run.run import Run, begin

__all__ = ["Request", "Run", "begin", "previewed"]
