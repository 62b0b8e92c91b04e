"""Apply a saved probe: to datasets, streamed, or to image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.dataset import Layout, Record, open_dataset
from resfeat.downstream.learning.classifier import Classifier
from resfeat.downstream.learning.views import View
from resfeat.errors import Failure, ResfeatError, UsageError, first_line, no_embedding
from resfeat.sources import printable
from resfeat.storage import draft, is_remote

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
    ]
)
BRIEF = 12  # digits of a fingerprint

Block = tuple[list[str], NDArray[np.float32]]  # ids, and vectors or what they add to the logits


class Predictions:
    """Iterates over batches of `SCHEMA`. left_out: afterwards, how many images are not in all
    datasets and so were not decided. failed: of image files, those that gave no embedding."""

    def __init__(
        self,
        classifier: Classifier,
        streams: Sequence[Iterable[Block]],
        failed: Mapping[str, Failure] | None = None,
    ) -> None:
        self._classifier = classifier
        self._streams = streams
        self.left_out = 0
        self.failed = failed or {}

    @classmethod
    def of_datasets(cls, classifier: Classifier, datasets: Sequence[Dataset]) -> Predictions:
        """All rows of datasets, one for each that it learned from, in any order. Raises UsageError
        where they are not of those fingerprints."""
        ordered = _by_view(classifier.views, datasets)
        return cls(
            classifier, [_rows(*each) for each in zip(ordered, classifier.views, strict=True)]
        )

    @classmethod
    def of_images(cls, classifier: Classifier, paths: Sequence[str]) -> Predictions:
        r"""Image files, embedded as the datasets that it learned from were. Ids are their names, of
        which bytes that are no UTF-8 become `\xNN`. Raises UsageError where none can be
        embedded."""
        unique = list(dict.fromkeys(paths))
        failed: dict[str, Failure] = {}
        made = []
        for view in classifier.views:
            vectors, failures = _embed(view, unique)
            made.append(vectors)
            failed |= {name: why for name, why in zip(unique, failures, strict=True) if why}
        if len(failed) == len(unique):
            raise no_embedding(failed)
        whole = [n for n, name in enumerate(unique) if name not in failed]
        names = [printable(unique[n]) for n in whole]
        return cls(classifier, [[(names, vectors[whole])] for vectors in made], failed)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """An image of several datasets waits until all have come to it; at once where they list the
        same images in the same order. Only its share of the logits is kept meanwhile."""
        count = len(self._streams)
        waiting: dict[str, list[NDArray[np.float32] | None]] = {}
        for blocks in zip_longest(*self._streams):
            ids, shares = [], []
            for view, block in enumerate(blocks):
                if block is None:
                    continue
                keys, vectors = block
                for key, share in zip(keys, self._classifier.share(view, vectors), strict=True):
                    of_image = waiting.setdefault(key, [None] * count)
                    of_image[view] = share.copy()  # one that waits keeps no others in memory
                    if all(each is not None for each in of_image):
                        ids.append(key)
                        shares.append(waiting.pop(key))
            if ids:
                yield self._decided(ids, np.array(shares))
        self.left_out = len(waiting)

    def _decided(self, ids: list[str], shares: NDArray[np.float32]) -> pa.RecordBatch:
        """shares: [N, views, classes]."""
        best, probability = self._classifier.decide(list(shares.swapaxes(0, 1)))
        names = [self._classifier.classes[place] for place in best]
        return pa.record_batch([pa.array(ids), pa.array(names), pa.array(probability)], SCHEMA)


def open_targets(targets: Sequence[str]) -> list[Dataset]:
    """The datasets that these are; none where all are files. Raises UsageError for a mixture, and
    for a folder that is no dataset."""
    folders = [target for target in targets if _is_folder(target)]
    if folders and len(folders) < len(targets):
        raise UsageError("datasets and image files together: give either of them")
    return [open_dataset(folder) for folder in folders]


def _is_folder(target: str) -> bool:
    if is_remote(target):
        return Record.load(Layout(target)) is not None
    return Path(target).is_dir()


def write_predictions(path: str, batches: Iterable[pa.RecordBatch]) -> int:
    """A Parquet file, which appears whole; returns its rows."""
    if is_remote(path):
        raise UsageError(f"--output {path}: give a file on a disk")
    target, rows = Path(path).absolute(), 0
    made = draft(target.parent, target.name)
    try:
        with pq.ParquetWriter(made.sink, SCHEMA, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += len(batch)
        made.publish(target)
    except OSError as error:
        raise ResfeatError(f"cannot write {path}: {first_line(error)}; give another") from error
    finally:
        made.discard()
    return rows


def _rows(dataset: Dataset, view: View) -> Iterator[Block]:
    for ids, vectors in dataset.vectors(layer=view.layer):
        yield ids.to_pylist(), vectors


def _embed(view: View, paths: Sequence[str]) -> tuple[NDArray[np.float32], list[Failure | None]]:
    try:
        dataset = open_dataset(view.path)
    except UsageError as error:
        raise UsageError(
            f"the dataset that the probe learned from, which says how images are embedded, is not "
            f"at {view.path} any more: bring it back, or put its new path into probe.json"
        ) from error
    _by_view([view], [dataset])
    from resfeat.downstream.embedder import Embedder  # it takes torch with it

    with closing(Embedder.of(dataset, view.layer)) as embedder:
        return embedder.attempt(paths)


def _by_view(views: Sequence[View], datasets: Sequence[Dataset]) -> list[Dataset]:
    """For each view the dataset of its fingerprint."""
    known = {dataset.record.identity.fingerprint: dataset for dataset in datasets}
    wanted = {view.fingerprint: view for view in views}
    for fingerprint, dataset in known.items():
        if fingerprint not in wanted:
            needs = " and ".join(f"{v.model} ({f[:BRIEF]})" for f, v in wanted.items())
            raise UsageError(
                f"{dataset.layout.root} holds other embeddings than the probe learned from: "
                f"{dataset.record.identity.model} ({fingerprint[:BRIEF]}) there, {needs} in the "
                "probe: give a dataset of the same model, weights and preprocessing"
            )
    for fingerprint, view in wanted.items():
        if fingerprint not in known:
            raise UsageError(
                f"the probe learned from {len(wanted)} datasets together, and one of "
                f"{view.model} ({fingerprint[:BRIEF]}) is missing: give one of each"
            )
    if len(known) < len(datasets):
        raise UsageError("two of the datasets have the same fingerprint: predict one at a time")
    return [known[view.fingerprint] for view in views]
