"""The dataset card: a README.md that says what lies there, to people and to `load_dataset`."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from resfeat.dataset.layout import Layout
from resfeat.dataset.record import Record
from resfeat.dataset.schema import FAILURES, embeddings_schema
from resfeat.storage import write_whole

# Without it, `datasets` and the Hugging Face hub would take every Parquet file here for rows.
_CARD = """\
---
configs:
- config_name: default
  data_files: embeddings/*.parquet
---
# Embeddings of {record.plan.items:,} images by {identity.model}

Made by resfeat {record.versions[resfeat]} on {record.created:.10}.

| | |
| --- | --- |
| model | `{identity.model}`, layers {layers}, pooling {identity.pool}, {identity.precision} |
| weights | `{record.weights}` |
| sources | {sources} |
| fingerprint | `{identity.fingerprint}` |

`embeddings/` has a row for each image that could be embedded, `failures/` one for each that could
not, with the reason. No image is in both. `_resfeat/` is what resfeat needs to go on and to verify.

| column of `embeddings/` | type |
| --- | --- |
{embeddings}

| column of `failures/` | type |
| --- | --- |
{failures}

It is plain Parquet. In Python, with any of these:

```python
datasets.load_dataset("OUT")
pandas.read_parquet("OUT/embeddings")
polars.read_parquet("OUT/embeddings/*.parquet")
resfeat.open_dataset("OUT").vectors()
```

To find the images nearest to one of your own: `resfeat search OUT photo.jpg`.
To see whether every image is still there, once: `resfeat verify OUT`.
"""


def write_card(
    layout: Layout, record: Record, dims: Mapping[str, int], carried: Sequence[pa.Field]
) -> None:
    """Write the card of a dataset. dims, carried: as `embeddings_schema` has them."""
    identity, with_label = record.identity, record.source_options.label_from is not None
    columns = embeddings_schema(identity, dims, with_label=with_label, carried=carried)
    text = _CARD.format(
        record=record,
        identity=identity,
        layers=", ".join(identity.layers),
        sources=", ".join(f"`{source}`" for source in record.sources),
        embeddings=_rows(columns),
        failures=_rows(FAILURES),
    )
    write_whole(layout.tmp, layout.card, text.encode())


def _rows(schema: pa.Schema) -> str:
    return "\n".join(f"| `{field.name}` | {field.type} |" for field in schema)
