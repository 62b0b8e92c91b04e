"""The plan of a run: made, taken over, updated, or only looked at.

Whoever calls these, but for `previewed`, holds the dataset as a whole.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from resfeat.dataset import Dataset, Layout, Record, commit_generation, is_alone, write_card
from resfeat.errors import ResfeatError
from resfeat.plan import Changes, Plan, carried_columns, shard_size_for, write_plan
from resfeat.reporting import Preview, last_rate, versions
from resfeat.run.request import Request
from resfeat.storage import remove_all

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights


def settled(
    request: Request, layout: Layout, weights: Weights
) -> tuple[Record, bool, Changes | None]:
    """The record that a run goes by, whether it is new, and what an update found."""
    record = Record.load(layout)
    if record and not layout.committed() and is_alone(request.layout):
        record = _taken_over(request, layout, weights, record)
        if record is None:
            request.listing.open()  # before the listing that is there is given up
            Record.forget(layout)
    if record and not layout.is_on_disk:
        record.save(layout)  # what an earlier holder sent comes too late now
    if record is None:
        return _make_plan(request, layout, weights), True, None
    record.check_same(layout, _asked(request, weights, record.plan, record.created))
    if not request.spec.update:
        return record, False, None
    record, changes = _update(request, record, weights)
    return record, False, changes


def _make_plan(request: Request, layout: Layout, weights: Weights) -> Record:
    """List the sources, freeze the listing, and write down what the dataset is."""
    spec, listing = request.spec, request.listing
    if layout.is_on_disk:
        remove_all(layout.plan)  # of a run that was killed while it was listing
    layout.plan.mkdir()
    plan = write_plan(layout.plan, layout.tmp, request.listed(), spec.shard_size, listing.carried)
    if not plan.items:
        raise request.no_images()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return _written(request, layout, _asked(request, weights, plan, now), weights)


def _update(request: Request, record: Record, weights: Weights) -> tuple[Record, Changes]:
    """List the sources again, and make what that gives the dataset's plan, if it differs."""
    layout = request.layout
    found = request.difference(record)
    request.check_gone(record, found.changes)
    if found.changes:
        plan = found.write(layout.tmp)
        # The card first: a run that is killed behind the record finds nothing left to change.
        now = replace(record, plan=plan)
        write_card(layout, now, weights.dims, request.listing.carried)
        record = commit_generation(layout, record, plan)
    return record, found.changes


def _taken_over(
    request: Request, layout: Layout, weights: Weights, record: Record
) -> Record | None:
    """The listing of a run that committed nothing, with the choices of this one: nothing binds it
    to those of the last. None if this run would list something else."""
    now = _asked(request, weights, record.plan, record.created)
    listed = [(each.sources, each.source_options, each.plan.shard_size) for each in (record, now)]
    if listed[0] != listed[1]:
        return None
    return (
        record if record.identity == weights.identity else _written(request, layout, now, weights)
    )


def _written(request: Request, layout: Layout, record: Record, weights: Weights) -> Record:
    """The record of a dataset that has no rows yet, written down, and its card."""
    write_card(layout, record, weights.dims, carried_columns(layout.plan, record.plan))
    record.save(layout)
    return record


def _asked(request: Request, weights: Weights, plan: Plan, created: str) -> Record:
    """What this run would have the dataset be, with a plan of its own or that which is there."""
    spec = request.spec
    return Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=tuple(request.listing.roots),
        source_options=spec.source_options,
        plan=replace(plan, shard_size=spec.shard_size or plan.shard_size),
        created=created,
        versions=versions(),
    )


def previewed(request: Request, weights: Weights) -> Preview:
    """What a run would do: of a first one, and of an update, once it has listed."""
    if record := Record.load(request.layout):
        return _previewed_next(request, weights, record)
    items = sum(table.num_rows for table in request.listed())
    if not items:
        raise request.no_images()
    size, mine = request.spec.shard_size or shard_size_for(items), request.partition
    starts = [n * size for n in range(-(-items // size)) if mine is None or mine.has(n)]
    images = sum(min(size, items - start) for start in starts)
    return Preview(output=str(request.layout.root), items=images, images=images, shards=len(starts))


def _previewed_next(request: Request, weights: Weights, record: Record) -> Preview:
    """What a run would do with a dataset that is there."""
    record.check_same(request.layout, _asked(request, weights, record.plan, record.created))
    todo, changes, refusal = request.todo(record), None, None
    images, shards = sum(shard.rows for shard in todo), len(todo)
    items = sum(shard.rows for shard in request.shards(record))
    if request.spec.update:
        found = request.difference(record)
        changes = found.changes
        items += changes.added - changes.removed
        images += changes.added + changes.changed
        shards = len({shard.number for shard in (*todo, *found.touched)}) + found.new_shards
        try:
            request.check_gone(record, changes)
        except ResfeatError as error:
            refusal = str(error)
    return Preview(
        output=str(request.layout.root),
        items=items,
        images=images,
        shards=shards,
        update=changes,
        rate=last_rate(Dataset(request.layout, record)),
        refusal=refusal,
    )
