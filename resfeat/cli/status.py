"""resfeat status"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from resfeat.cli import options, shown

if TYPE_CHECKING:
    from resfeat.dataset import Commits, Dataset


@click.command(epilog="\b\nExample:\n  resfeat status embeddings")
@options.dataset
@options.as_json
def status(output: str, as_json: bool) -> None:
    """Show what the dataset OUT is, and how much of it is done."""
    from resfeat.dataset import ALL, Layout, holder, open_dataset
    from resfeat.reporting import ANY, retried

    dataset = open_dataset(output)
    record, plan = dataset.record, dataset.record.plan
    commits, runs = dataset.commits(), dataset.runs()
    shares = {ALL, *dataset.layout.shares()}
    writers = {share: holder(Layout(str(dataset.layout.root), share)) for share in shares}
    told = {
        "dataset": str(dataset.layout.root),
        "model": record.identity.model,
        "weights": record.weights,
        "layers": list(record.identity.layers),
        "precision": record.identity.precision,
        "parity": dict(record.parity) if record.parity else None,
        "fingerprint": record.identity.fingerprint,
        "sources": list(record.sources),
        "created": record.created,
        "generation": plan.generation,
        "shards": len(plan.shards),
        "shards_committed": len(commits.done),
        "images": plan.items,
        "embedded": commits.embedded,
        "failed": sum(commits.reasons.values()),
        "reasons": dict(commits.reasons),
        "retried": len(retried(runs[-len(shares) :], ANY)),
        "runs": len(runs),
        "writer": writers.get(ALL),
        "partitions": _partitions(dataset, commits, writers),
        "complete": len(commits.done) == len(plan.shards),
    }
    if as_json:
        click.echo(json.dumps(told))
        return
    width = max(map(len, told))
    for name, value in told.items():
        click.echo(f"{name:<{width}}  {shown(_text(value))}")


def _partitions(
    dataset: Dataset, commits: Commits, writers: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """The partitions of a dataset that is shared out: those of the runs that are writing now, or
    else of the finest division that there was."""
    from resfeat.plan import Partition

    found = [each for share in writers if (each := Partition.of_share(share))]
    writing = [each for each in found if writers[each.share]]
    count = max((each.of for each in writing or found), default=0)
    left = dataset.record.plan.shards.keys() - commits.done.keys()
    every = [Partition(number, count) for number in range(1, count + 1)]
    return [
        {
            "partition": str(each),
            "shards_left": sum(map(each.has, left)),
            "started": each.share in writers,
            "writer": writers.get(each.share),
        }
        for each in every
    ]


def _state(partition: Mapping[str, Any]) -> str:
    left, writer = partition["shards_left"], partition["writer"]
    doing = "done" if not left else f"{left:,} shards left"
    if left and not writer:
        doing += ", nobody at it" if partition["started"] else ", never started"
    return f"{partition['partition']} {doing}" + (f" ({writer})" if writer else "")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {name}" for name, count in value.items()) or "-"
    if isinstance(value, list):
        every = (_state(each) if isinstance(each, dict) else str(each) for each in value)
        return ", ".join(every) or "-"
    return "-" if value is None else str(value)
