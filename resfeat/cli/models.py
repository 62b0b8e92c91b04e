"""resfeat models"""

from __future__ import annotations

import json

import click


@click.command(epilog="\b\nExample:\n  resfeat models")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def models(as_json: bool) -> None:
    """List the backbones, what they give, and the names of their published weights."""
    import torch
    from torchvision.models import get_model_weights

    from resfeat.backbones import BACKBONES, build

    rows = []
    for name in BACKBONES:
        with torch.device("meta"):  # shapes only: nothing is allocated
            backbone = build(name)
        published = get_model_weights(name)
        rows.append(
            {
                "model": name,
                "dimension": backbone.dim,
                "parameters": sum(p.numel() for p in backbone.parameters()),
                "input": published.DEFAULT.transforms().crop_size[0],
                "weights": [entry.name for entry in published],
                "default": published.DEFAULT.name,
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'model':<10} {'dimension':>9} {'parameters':>11} {'input':>5}  weights")
    for row in rows:
        click.echo(
            f"{row['model']:<10} {row['dimension']:>9,} {row['parameters']:>11,} "
            f"{row['input']:>5}  {', '.join(row['weights'])} (DEFAULT is {row['default']})"
        )
