"""resfeat status"""

import json

import click

from resfeat.cli import options, shown


@click.command(epilog="\b\nExample:\n  resfeat status embeddings")
@click.argument("output", metavar="OUT")
@options.as_json
def status(output: str, as_json: bool) -> None:
    """Show what the dataset OUT is, and how much of it is done."""
    from resfeat.dataset import holder, open_dataset

    dataset = open_dataset(output)
    record, plan = dataset.record, dataset.record.plan
    commits = dataset.commits()
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
        "shards": len(plan.shards),
        "shards_committed": len(commits.done),
        "images": plan.items,
        "embedded": commits.embedded,
        "failed": sum(commits.reasons.values()),
        "reasons": dict(commits.reasons),
        "runs": len(dataset.runs()),
        "writer": holder(dataset.layout),
        "complete": len(commits.done) == len(plan.shards),
    }
    if as_json:
        click.echo(json.dumps(told))
        return
    width = max(map(len, told))
    for name, value in told.items():
        click.echo(f"{name:<{width}}  {shown(_text(value))}")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {name}" for name, count in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
