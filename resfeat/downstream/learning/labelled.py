"""Labelled images: the vectors of one dataset, or of several side by side, and a class each."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resfeat.dataset.reader import SENT_BACK, readable
from resfeat.dataset.schema import carried_fields
from resfeat.downstream.learning.views import View
from resfeat.downstream.unit import unit
from resfeat.errors import ResfeatError, UsageError, first_line

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

Labels = Mapping[str, str | None]
NAMED = 3  # classes that a note names


@dataclass(frozen=True)
class LeftOut:
    """Images that a probe cannot use. not_in_all: in some datasets only. alone: the classes with a
    single image, which cannot be both learned and tested."""

    not_in_all: int
    unlabelled: int
    alone: tuple[str, ...]

    def __str__(self) -> str:
        told = []
        if self.not_in_all:
            told.append(f"{self.not_in_all:,} not in every dataset")
        if self.unlabelled:
            told.append(f"{self.unlabelled:,} without a label")
        if self.alone:
            more = ", ..." if len(self.alone) > NAMED else ""
            names = ", ".join(self.alone[:NAMED]) + more
            told.append(f"{len(self.alone):,} alone in their class ({names})")
        return "; ".join(told)


@dataclass(frozen=True)
class Labelled:
    """which: int [N], the place of each image's class in `classes`. vectors: float32 [N, D], each
    view's scaled to a length of 1, side by side in the order of `views`."""

    views: tuple[View, ...]
    classes: tuple[str, ...]
    which: NDArray[np.intp]
    vectors: NDArray[np.float32]
    left_out: LeftOut

    def of(self, view: int) -> NDArray[np.float32]:
        """The vectors of one view alone, [N, D]."""
        return self.vectors[:, columns_of(self.views)[view]]


def columns_of(views: Sequence[View]) -> list[slice]:
    """Where the vectors of each view stand, side by side."""
    ends = list(accumulate((view.dims for view in views), initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]


def labels_of(datasets: Sequence[Dataset], column: str) -> Labels:
    """The label of each image, by id, of the first dataset that has such a column: `label`, or one
    that is carried. Raises UsageError, with those there are, where none has it."""
    there: dict[str, None] = {}
    for dataset in datasets:
        with readable(dataset.layout.embeddings, SENT_BACK):
            schema = dataset.embeddings.schema
        fields = {field.name: field for field in carried_fields(schema)}
        if "label" in schema.names:
            fields["label"] = schema.field("label")
        if column in fields:
            _check_type(fields[column], dataset)
            with readable(dataset.layout.embeddings, SENT_BACK):
                table = dataset.embeddings.to_table(columns=["id", column])
            return dict(zip(table["id"].to_pylist(), map(_label, table[column].to_pylist()),
                            strict=True))  # fmt: skip
        there.update(dict.fromkeys(fields))
    known = f"give one of {', '.join(there)}" if there else (
        "it has none: give --labels F.csv, or extract it anew with --label-from parent or --keep"
    )  # fmt: skip
    roots = " and ".join(str(dataset.layout.root) for dataset in datasets)
    raise UsageError(f"no column '{column}' with labels in {roots}: {known}")


def labels_of_file(path: str, column: str) -> Labels:
    """The label of each image, by id, of a CSV file with a column `id` and this one."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read the labels in {path}: {first_line(error)}") from error
    for name in ("id", column):
        if name not in names:
            raise UsageError(
                f"{path} has no column '{name}': its first line must name an id and a "
                f"{column}, and names {', '.join(names) or 'nothing'}"
            )
    labels: dict[str, str | None] = {}
    for row in rows:
        label = _label(row[column])
        if labels.setdefault(row["id"], label) != label:
            raise UsageError(f"{path} gives '{row['id']}' two labels: leave one of its rows")
    return labels


def gather(datasets: Sequence[Dataset], views: Sequence[View], labels: Labels) -> Labelled:
    """The images that all datasets have, with a label that they share with another.

    Holds all their vectors in memory. Raises UsageError where less than two classes are left.
    """
    ids, not_in_all = _in_all(datasets)
    known = {key: label for key in ids if (label := labels.get(key)) is not None}
    if not known:
        raise UsageError(_unlabelled(ids, labels))
    counts = Counter(known.values())
    classes = in_order(name for name, count in counts.items() if count > 1)
    if len(classes) < 2:
        raise UsageError(_too_few_classes(counts, datasets))
    place = {name: number for number, name in enumerate(classes)}
    used = {key: place[label] for key, label in known.items() if counts[label] > 1}
    alone = in_order(name for name, count in counts.items() if count == 1)
    return Labelled(
        tuple(views),
        classes,
        np.array(list(used.values()), np.intp),
        _vectors(datasets, views, list(used)),
        LeftOut(not_in_all, len(ids) - len(known), alone),
    )


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Classes by their numbers, where all are such, and else by name."""
    unsorted = list(names)
    if all(name.isdecimal() for name in unsorted):
        return tuple(sorted(unsorted, key=lambda name: (int(name), name)))
    return tuple(sorted(unsorted))


def _in_all(datasets: Sequence[Dataset]) -> tuple[list[str], int]:
    """The ids that all have, in the order of the first; and how many only some have."""
    each: list[list[str]] = []
    for dataset in datasets:
        with readable(dataset.layout.embeddings, SENT_BACK):
            each.append(dataset.embeddings.to_table(columns=["id"])["id"].to_pylist())
    common = set(each[0]).intersection(*each[1:])
    if not common:
        roots = [str(dataset.layout.root) for dataset in datasets]
        some = ", ".join(f"'{ids[0]}' in {root}" for ids, root in zip(each, roots, strict=True))
        raise UsageError(
            f"the datasets have no image in common ({some}): extract all from the same sources"
        )
    return [key for key in each[0] if key in common], len(set().union(*each)) - len(common)


def _vectors(
    datasets: Sequence[Dataset], views: Sequence[View], ids: Sequence[str]
) -> NDArray[np.float32]:
    """The vectors of these ids, side by side, in their order."""
    columns, place = columns_of(views), {key: row for row, key in enumerate(ids)}
    every = np.empty((len(ids), columns[-1].stop), np.float32)
    for dataset, view, column in zip(datasets, views, columns, strict=True):
        filled = 0
        for keys, vectors in dataset.vectors(layer=view.layer):
            rows = np.array([place.get(key, -1) for key in keys.to_pylist()], np.intp)
            every[rows[rows >= 0], column] = unit(vectors[rows >= 0])
            filled += int((rows >= 0).sum())
        if filled != len(ids):
            raise ResfeatError(f"{view.path} changed while it was read: try again")
    return every


def _check_type(field: pa.Field, dataset: Dataset) -> None:
    kind = field.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UsageError(
            f"the column '{field.name}' of {dataset.layout.root} has the type {kind}: "
            "give one of text or numbers"
        )


def _label(value: Any) -> str | None:
    """A label as text. None for what is no label: null, NaN or an empty text."""
    return None if value is None or value != value or value == "" else str(value)


def _unlabelled(ids: Sequence[str], labels: Labels) -> str:
    known = set(ids)
    if other := next((key for key in labels if key not in known), None):
        return (
            f"no image has a label: the labels are of ids like '{other}', and the images have ids "
            f"like '{ids[0]}': give labels of these ids"
        )
    return f"none of the {len(ids):,} images has a label: give a column or a file that has some"


def _too_few_classes(counts: Counter[str], datasets: Sequence[Dataset]) -> str:
    several = in_order(name for name, count in counts.items() if count > 1)
    root = datasets[0].layout.root
    if not several:
        return (
            f"no two images of {root} have the same label ('{next(iter(counts))}' is one of "
            f"{len(counts):,}): give a column of classes"
        )
    if len(counts) == 1:
        return (
            f"all {counts.total():,} labelled images of {root} are '{several[0]}': "
            "a probe needs two classes"
        )
    return (
        f"'{several[0]}' is the only class of {root} with two images or more: a probe needs two "
        f"such classes, and {len(counts) - 1:,} have one image"
    )
