"""The next generation of a dataset's plan, put in place in one atomic step.

    listed     its files are in the plan's folder, and nobody reads them
    current    the record names them: from now on what they changed is to be done
    pruned     files that list no shard any more are gone

A run that is killed before the record is in place leaves the dataset as it was.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, get_args

from resfeat.dataset.layout import Layout
from resfeat.dataset.record import Record
from resfeat.plan import Plan
from resfeat.storage import Location, remove

Step = Literal["listed", "current", "pruned"]
STEPS: tuple[Step, ...] = get_args(Step)


def on_step(step: Step) -> None:
    """Called after each step. Does nothing; the tests stop a run here."""


def commit_generation(layout: Layout, record: Record, plan: Plan) -> Record:
    """Make a plan, whose files are there, that of the dataset."""
    on_step("listed")
    record = replace(record, plan=plan)
    record.save(layout)
    on_step("current")
    named = {file.name for file in plan.files}
    there: Iterable[Location] = layout.plan.iterdir()
    for path in list(there):
        # Of this generation or of an earlier one: a later one gives other names.
        if path.name not in named:
            layout.fence.check()
            remove(path)
    on_step("pruned")
    return record
