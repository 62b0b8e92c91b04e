"""Groups of images that are (nearly) the same, by the cosine of their embeddings; which of them are
the same file is told by its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.dataset import Parts
from resfeat.downstream.duplicates.copies import Copies, copies
from resfeat.downstream.duplicates.links import Places
from resfeat.downstream.duplicates.pairs import linked
from resfeat.downstream.index import prepared
from resfeat.downstream.pictures import Tile, write_document
from resfeat.errors import UsageError, public

if TYPE_CHECKING:
    from resfeat.dataset import Dataset
    from resfeat.downstream.index import Index
    from resfeat.sources import Item

THRESHOLD = 0.95
# Of a larger group not every pair is looked at: see `Group`.
LARGE = 2048
HELD_BYTES = 256 << 20  # of vectors of groups that are looked at together

SHOWN_GROUPS, SHOWN_MEMBERS = 100, 12  # on a page

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Member:
    """An image of a group. cosine: to the one that is kept; is_equal: whether its embedding is that
    of the one that is kept, bit for bit, as that of the same picture is. size: bytes.

    copy_of: the id of the one before it whose file has the same bytes, if there is one. unread: why
    that could not be found out, as its file cannot be read any more; then copy_of is None.
    """

    id: str
    width: int
    height: int
    size: int
    cosine: float
    is_equal: bool
    copy_of: str | None = None
    unread: str | None = None

    def near(self, kept: Member) -> str:
        """How near it is to the one that is kept, in a word or as a cosine."""
        if self.copy_of == kept.id:
            return "exact"
        return "equal" if self.is_equal else f"{self.cosine:.4f}"


@dataclass(frozen=True)
class Group:
    """Images that are linked by near ones. The first is to be kept: the largest picture, and of
    those the first by id; the others come by cosine.

    least_cosine: of all pairs. A chain of near images may join two that are not. is_bound: of a
    group of more than `LARGE` images each is compared with the one that is kept, and this is what
    no pair can be below by the angles to that one: the sum of the two largest.
    """

    members: tuple[Member, ...]
    least_cosine: float
    is_bound: bool


def find_duplicates(
    dataset: Dataset,
    threshold: float = THRESHOLD,
    layer: str | None = None,
    index: Index | None = None,
    tell: Tell = lambda step: None,
) -> list[Group]:
    """Groups of images with a cosine of at least `threshold` to another one, the largest first.

    layer: which embedding of several; the last by default. index: a fresh one for the cosine, for
    datasets of which all pairs are too many: what it does not find is not linked. Images of the
    same embedding and size are read once more, to know which are copies of a file. Raises
    UsageError for a threshold that is no cosine above 0, and for an index that is stale.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold:.15g}: give a cosine above 0, and at most 1")
    if index and index.stale:
        raise UsageError(f"{index.stale}: build it again (`resfeat index`), or give none")
    parts = Parts(dataset, layer)
    if not parts.rows:
        raise dataset.empty()
    places, hashes = linked(parts, threshold, index, tell)
    if places:
        tell(f"comparing the members of {len(places):,} groups")
    found = list(_groups(parts, places, hashes))
    parts.check()
    known = copies(dataset, [each for _, some in found for each in some], tell)
    groups = [_with_copies(group, known) for group, _ in found]
    return sorted(groups, key=lambda group: -len(group.members))


def _with_copies(group: Group, known: Copies) -> Group:
    members = (
        replace(each, copy_of=known.original.get(each.id), unread=known.unread.get(each.id))
        for each in group.members
    )
    return replace(group, members=tuple(members))


def _groups(
    parts: Parts, places: Sequence[Places], hashes: NDArray[np.uint64]
) -> Iterator[tuple[Group, list[tuple[int, list[str]]]]]:
    """Each with those in it that may be the same file, by embedding and size: that, and their
    ids."""
    most = max(LARGE, HELD_BYTES // (4 * parts.dim))
    for some in _packed(places, most):
        every = np.sort(np.concatenate(some))
        table = parts.at(every, ["id", "width", "height", "size"])
        ids, widths, heights, sizes = (column.to_pylist() for column in table.columns)
        vectors = None
        if len(every) <= most:
            vectors = prepared(parts.vectors_at(every), "cosine")
        for group in some:
            at = np.searchsorted(every, group)
            rows = [(ids[n], widths[n], heights[n], sizes[n]) for n in at.tolist()]
            order = sorted(range(len(group)), key=lambda n: (-rows[n][1] * rows[n][2], rows[n][0]))
            kept = order[0]
            if vectors is None or len(group) > LARGE:
                cosines = _to_one(parts, group, int(group[kept]), most)
                least, is_bound = _bound(cosines), True
            else:
                mine = vectors[at]
                cosines, least, is_bound = mine @ mine[kept], float((mine @ mine.T).min()), False
            is_equal = hashes[group] == hashes[group[kept]]
            cosines = np.where(is_equal, 1, np.clip(cosines, -1, 1))
            order[1:] = sorted(order[1:], key=lambda n: (-cosines[n], rows[n][0]))
            members = (Member(*rows[n], float(cosines[n]), bool(is_equal[n])) for n in order)
            alike: dict[tuple[int, int], list[str]] = {}
            for n in order:
                alike.setdefault((int(hashes[group[n]]), rows[n][3]), []).append(rows[n][0])
            several = [(size, ids) for (_, size), ids in alike.items() if len(ids) > 1]
            yield Group(tuple(members), min(1.0, least), is_bound), several


def _packed(places: Sequence[Places], most: int) -> Iterator[list[Places]]:
    """Groups that are looked at together: of at most so many images, or one larger one."""
    some: list[Places] = []
    for group in places:
        if some and sum(map(len, some)) + len(group) > most:
            yield some
            some = []
        some.append(group)
    if some:
        yield some


def _to_one(parts: Parts, group: Places, kept: int, most: int) -> NDArray[np.float32]:
    """The cosine of each to one of them."""
    one = prepared(parts.vectors_at(np.array([kept])), "cosine")[0]
    pieces = np.array_split(group, -(-len(group) // most))
    return np.concatenate([prepared(parts.vectors_at(piece), "cosine") @ one for piece in pieces])


def _bound(cosines: NDArray[np.float32]) -> float:
    """What the cosine of no two can be below, by their cosines to one."""
    angles = np.sort(np.arccos(np.clip(cosines.astype(np.float64), -1, 1)))
    return float(np.cos(min(np.pi, angles[-2:].sum())))


def duplicate_tiles(
    groups: Sequence[Group], items: Callable[[list[str]], Mapping[str, Item]]
) -> tuple[list[list[Tile]], list[str]]:
    """The largest groups as rows of a page, which would be too large with all, and what stands
    above each. items: gives images by their ids."""
    some = [(group, group.members[:SHOWN_MEMBERS]) for group in groups[:SHOWN_GROUPS]]
    there = items([each.id for _, members in some for each in members]) if some else {}
    rows, headings = [], []
    for group, members in some:
        kept = group.members[0]
        rows.append([Tile(_caption(each, kept), each.id, there.get(each.id)) for each in members])
        least = f"{'at least ' if group.is_bound else ''}{group.least_cosine:.4f}"
        heading = f"{len(group.members):,} images, least cosine {least}"
        more = len(group.members) - len(members)
        headings.append(heading + (f"; {more:,} more are not shown" if more else ""))
    for row in rows:
        row[0] = row[0]._replace(heading=f"keep, {row[0].heading.partition(', ')[2]}")
    return rows, headings


def _caption(member: Member, kept: Member) -> str:
    told = [member.near(kept), f"{member.width} x {member.height}", f"{member.size:,} bytes"]
    if member.copy_of not in (None, kept.id):
        told.append(f"a copy of {public(str(member.copy_of))}")
    return ", ".join(told)


def write_groups(groups: Sequence[Group], path: str) -> None:
    """A row for each member as Parquet, those of a group one after another."""
    rows = [(number, group, each) for number, group in enumerate(groups) for each in group.members]
    members = [each for *_, each in rows]
    table = pa.table(
        {
            "group": pa.array([number for number, *_ in rows], pa.int32()),
            "id": pa.array([each.id for each in members], pa.string()),
            "keep": pa.array([each is group.members[0] for _, group, each in rows], pa.bool_()),
            "equal": pa.array([each.is_equal for each in members], pa.bool_()),
            "copy_of": pa.array([each.copy_of for each in members], pa.string()),
            "unread": pa.array([each.unread for each in members], pa.string()),
            "cosine": pa.array([each.cosine for each in members], pa.float32()),
            "least_cosine": pa.array([group.least_cosine for _, group, _ in rows], pa.float32()),
            "least_is_bound": pa.array([group.is_bound for _, group, _ in rows], pa.bool_()),
            "width": pa.array([each.width for each in members], pa.int32()),
            "height": pa.array([each.height for each in members], pa.int32()),
            "size": pa.array([each.size for each in members], pa.int64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_document(path, sink.getvalue().to_pybytes())
