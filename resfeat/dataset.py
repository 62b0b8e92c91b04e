"""A dataset on disk: its record, and reading its rows."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.errors import ResfeatError, UsageError
from resfeat.layout import Layout
from resfeat.plan import Plan
from resfeat.sink import FAILURES, write_json
from resfeat.spec import Identity
from resfeat.store import Location, StoreError, dataset_of, open_parquet, patiently

# pyarrow.dataset is imported where it is used: it takes pandas with it, half a second.
if TYPE_CHECKING:
    import pyarrow.dataset as ds

FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Record:
    """`_resfeat/spec.json`: what the dataset is. Written once, when its plan is complete.

    weights: what to give as --weights to find the same weights again. parity: how near to the
    reference a sample of the embeddings was when it was first measured; None for the reference.
    quantised: the digest of the network that int8 embeddings come from; None for others.
    """

    identity: Identity
    weights: str
    sources: tuple[str, ...]
    label_from: str | None
    plan: Plan
    created: str
    versions: Mapping[str, str]
    parity: Mapping[str, float] | None = None
    quantised: str | None = None

    def save(self, layout: Layout) -> None:
        content = {
            "format": FORMAT,
            "fingerprint": self.identity.fingerprint,
            **asdict(self),
        }
        write_json(layout, layout.spec, content)

    @classmethod
    def load(cls, layout: Layout) -> Record | None:
        """The record of the dataset at `layout`; None where there is none."""
        try:
            content = json.loads(layout.spec.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ResfeatError(f"cannot read {layout.spec}: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ResfeatError(
                f"{layout.root} was written by another version of resfeat: read it with that one"
            )
        try:
            fingerprint = content.pop("fingerprint")
            content["identity"] = Identity.from_dict(content["identity"])
            if content["identity"].fingerprint != fingerprint:
                raise ValueError("its fingerprint is not that of its identity")
            digests = tuple(content["plan"].pop("digests", ()))
            content["plan"] = Plan(**content["plan"], digests=digests)
            content["sources"] = tuple(content["sources"])
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ResfeatError(f"{layout.spec} is damaged ({error}): restore it") from error


def open_dataset(output: str | os.PathLike[str]) -> Dataset:
    """Open a dataset for reading, finished or not. Raises UsageError where there is none."""
    layout = Layout(output)
    record = Record.load(layout) if str(output) else None
    if record is None:
        raise UsageError(
            f"no resfeat dataset at {layout.root}: make one with `resfeat extract SRC -o {output}`"
        )
    return Dataset(layout, record)


class Dataset:
    """The committed rows of a dataset. Everything is streamed or counted from file footers."""

    def __init__(self, layout: Layout, record: Record) -> None:
        self.layout = layout
        self.record = record

    @property
    def embeddings(self) -> ds.Dataset:
        """The embedded images, as a `pyarrow.dataset`."""
        import pyarrow.dataset as ds

        path, store = dataset_of(self.layout.embeddings)
        return ds.dataset(path, filesystem=store, format="parquet")

    @property
    def failures(self) -> ds.Dataset:
        """The images that gave no embedding, as a `pyarrow.dataset`."""
        import pyarrow.dataset as ds

        if not self.layout.with_failures():
            return ds.dataset(FAILURES.empty_table())
        path, store = dataset_of(self.layout.failures)
        return ds.dataset(path, filesystem=store, schema=FAILURES, format="parquet")

    def embedded(self) -> int:
        """Number of rows in `embeddings/`."""
        total = 0
        for shard in self.layout.committed():
            with open_part(self.layout.embeddings / self.layout.part_name(shard)) as part:
                total += part.metadata.num_rows
        return total

    def reasons(self) -> dict[str, int]:
        """Number of failure rows in committed shards by reason, the commonest first."""
        counts: Counter[str] = Counter()
        committed = set(self.layout.committed())
        for shard in self.layout.with_failures():
            if shard in committed:  # without its embeddings a shard is still to be done
                counts.update(self.reasons_in(shard))
        return dict(counts.most_common())

    def reasons_in(self, shard: int) -> list[str]:
        """The reason of each failure row of a shard that has some."""
        with open_part(self.layout.failures / self.layout.part_name(shard)) as part:
            reasons: list[str] = part.read(["reason"], use_threads=False)["reason"].to_pylist()
            return reasons

    def vectors(
        self, rows: int = 4096, layer: str | None = None
    ) -> Iterator[tuple[pa.Array, NDArray[np.float32]]]:
        """Ids and embeddings float32 [n, D] of a layer, n at most `rows`, in plan order.

        layer: the last one where it is not given. Raises UsageError for one that is not there.
        """
        column = self.check_layer(layer)
        for shard in self.layout.committed():
            with open_part(self.layout.embeddings / self.layout.part_name(shard)) as part:
                for batch in part.iter_batches(rows, columns=["id", column], use_threads=False):
                    flat = batch[column].flatten().to_numpy().astype(np.float32, copy=False)
                    yield batch["id"], flat.reshape(batch.num_rows, -1)

    def check_layer(self, layer: str | None) -> str:
        """The column of a layer, or of the last one. Raises UsageError where it is not there."""
        columns = self.record.identity.columns
        if layer is not None and layer not in columns:
            raise UsageError(
                f"{self.layout.root} has no layer '{layer}': give one of {', '.join(columns)}"
            )
        return columns[layer or list(columns)[-1]]

    def uris(self, ids: list[str]) -> dict[str, str]:
        """Where the images with these ids were when they were listed."""
        import pyarrow.compute as pc
        import pyarrow.dataset as ds

        wanted = pc.field("id").isin(ids)
        path, store = dataset_of(self.layout.plan)

        def look() -> pa.Table:
            plan = ds.dataset(path, filesystem=store, format="parquet")
            return plan.to_table(columns=["id", "uri"], filter=wanted)

        try:
            found = patiently(self.layout.plan, look) if store else look()
        except StoreError:
            raise
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise ResfeatError(
                f"{self.layout.plan}, the listing, cannot be read ({reason}): bring it back from a "
                "copy"
            ) from error
        return dict(zip(found["id"].to_pylist(), found["uri"].to_pylist(), strict=True))


@contextmanager
def open_part(part: Location) -> Iterator[pq.ParquetFile]:
    """A part, to be read. Raises ResfeatError, naming it, where that fails, be it half-way."""
    try:
        with open_parquet(part) as file:
            yield file
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise ResfeatError(f"{part} is gone: is a run writing here? Try again") from error
    except (OSError, ValueError, KeyError) as error:  # Arrow's own are of these
        reason = str(error).partition("\n")[0]
        raise ResfeatError(
            f"{part} cannot be read ({reason}): `resfeat verify --repair` sends what is damaged "
            "back to be done again"
        ) from error
