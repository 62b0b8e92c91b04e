"""Kinds of index: which one suits so many vectors and so much memory, and how FAISS makes it.

flat  every vector, compared with every query: exact
ivf   every vector, in lists around centres; a search looks into the nearest lists only
sq8   the same with a byte for each value
pq    the same with a byte for each eight values: coarse
hnsw  every vector, in a graph of neighbours; nothing can be removed from it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from resfeat.downstream.search import Metric
from resfeat.downstream.unit import unit
from resfeat.errors import UsageError, missing

Kind = Literal["flat", "ivf", "sq8", "pq", "hnsw"]
Auto = Literal["auto"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# As many bytes as a query may be compared with in a moment: some 30 ms on two cores.
QUICK_BYTES = 256 << 20
# Centres, as a multiple of the root of the number of rows; and rows to train each one on: FAISS
# asks for 39 or more.
LISTS, ROWS_A_LIST = 2, 64
LINKS = 32  # of a vector in HNSW, twice that on its lowest level
CODES = 256  # of one byte
NUMBER_BYTES = 48  # of a row: its number, and where FAISS keeps that
GROWTH = 1.5  # of an index's memory while it grows


@dataclass(frozen=True)
class Coarse:
    """A kind whose scores are only near the true ones: what it finds is compared once more, by the
    vectors in the dataset. times: so many times what is asked for. doubt: by how much a cosine may
    be too low beside the best that was found: codes of one kind are too low by about the same."""

    times: int
    doubt: float


# Of 10,000 to 20,000 clustered vectors no near pair was further off than 0.0015 and 0.0196.
COARSE: dict[Kind, Coarse] = {"sq8": Coarse(4, 0.005), "pq": Coarse(16, 0.03)}


# Of flat so many more than what is asked for, since others may be as near as the last.
TIES = 8


def asked_of(kind: Kind, k: int) -> int:
    """How many FAISS is asked for, so that the k nearest are among them."""
    if coarse := COARSE.get(kind):
        return coarse.times * k
    return k + TIES if kind == "flat" else k


@dataclass(frozen=True)
class Choice:
    """A kind, and why in one line."""

    kind: Kind
    why: str


def faiss() -> Any:
    """The library. Raises UsageError where it is not installed."""
    try:
        import faiss as library
    except ImportError as error:
        raise missing("an index", "faiss", "faiss") from error
    return library


def bytes_of(kind: Kind, rows: int, dim: int) -> int:
    """What an index takes in memory, about, and somewhat less as a file."""
    vector = {"flat": 4 * dim, "ivf": 4 * dim, "sq8": dim, "pq": _bytes_of_code(dim)}
    return rows * (NUMBER_BYTES + vector.get(kind, 4 * dim + 8 * LINKS + 16))


def build_bytes(kind: Kind, rows: int, dim: int) -> int:
    """What it may take to make an index, or to change one, beside what the process has anyway."""
    return int(GROWTH * bytes_of(kind, rows, dim))


def choose(rows: int, dim: int, memory: int, asked: Kind | None = None) -> Choice:
    """The kind for so many rows of `dim` values, of which the build fits into `memory` bytes.

    asked: a kind that is taken if it fits. Raises UsageError where it, or any, does not fit. HNSW
    is never chosen: each update would build it anew.
    """
    size = f"{rows:,} x {dim:,}"
    needed: dict[str, int] = {kind: build_bytes(kind, rows, dim) for kind in KINDS}
    if asked and needed[asked] > memory:
        raise UsageError(
            f"{asked} of {size} takes {_gb(needed[asked])} while it is built, and may take "
            f"{_gb(memory)}: give another --kind, or more --memory"
        )
    if asked:
        return Choice(asked, "as asked for")
    if needed["flat"] <= min(memory, int(GROWTH * QUICK_BYTES)):
        return Choice("flat", f"{size} are few enough to compare each query with all: exact")
    for kind, why in (
        ("ivf", f"{size} are too many to compare with each query, and fit into memory as they are"),
        ("sq8", f"{size} do not fit into {_gb(memory)} as they are, but do with a byte a value"),
        ("pq", f"{size} fit into {_gb(memory)} only in a coarse form, a byte for eight values"),
    ):
        if needed[kind] <= memory:
            return Choice(kind, why)  # type: ignore[arg-type] # the names above are of KINDS
    raise UsageError(
        f"an index of {size} takes at least {_gb(needed['pq'])} while it is built, and may take "
        f"{_gb(memory)}: give more --memory"
    )


def make(kind: Kind, metric: Metric, rows: int, dim: int) -> Any:
    """An empty index for so many rows. Its rows have the numbers that they are added with."""
    library = faiss()
    measure = library.METRIC_L2 if metric == "l2" else library.METRIC_INNER_PRODUCT
    if kind == "flat":
        index = library.index_factory(dim, "IDMap2,Flat", measure)
        # All its memory at once: by doubling it would take twice as much for a moment.
        codes = library.downcast_index(index.index).codes
        codes.resize(rows * dim * 4)
        codes.resize(0)
        return index
    if kind == "hnsw":
        return library.index_factory(dim, f"IDMap2,HNSW{LINKS}", measure)
    stored = {"ivf": "Flat", "sq8": "SQ8", "pq": f"PQ{_bytes_of_code(dim)}x8"}[kind]
    index = library.index_factory(dim, f"IVF{lists_of(rows)},{stored}", measure)
    index.cp.min_points_per_centroid = 1  # says nothing of small sets, where it matters little
    if kind == "pq":
        index.pq.cp.min_points_per_centroid = 1
        index.do_polysemous_training = (
            False  # for a way to search that we do not use: seconds a byte
        )
    return index


def write_index(index: Any, path: Path) -> None:
    """Write an index for FAISS to read. Raises OSError where it is not on the disk as a whole: of
    the end of a file FAISS itself takes no notice, and leaves half of it on a full disk."""
    library = faiss()
    with open(path, "wb") as file:
        library.write_index(index, library.PyCallbackIOWriter(file.write))


def lists_of(rows: int) -> int:
    """How many lists the rows are shared out among."""
    return max(1, min(round(LISTS * math.sqrt(rows)), rows // 39))


def sample_of(kind: Kind, rows: int) -> int:
    """How many rows the index is trained on; 0 where it needs no training."""
    if kind in ("flat", "hnsw"):
        return 0
    least = ROWS_A_LIST * CODES if kind == "pq" else 0
    return min(rows, max(ROWS_A_LIST * lists_of(rows), least))


def efforts_of(kind: Kind, rows: int) -> list[int]:
    """How hard a search may try, from the quickest on; 0 where there is no choice."""
    if kind == "flat":
        return [0]
    first, last = (16, 1024) if kind == "hnsw" else (1, lists_of(rows))
    steps = []
    while first < last:
        steps.append(first)
        first *= 2
    return [*steps, last]


def set_effort(index: Any, kind: Kind, effort: int) -> None:
    """Have searches try so hard: lists that they look into, or candidates that they keep. It is
    stored in the file, so FAISS does the same without us."""
    if kind == "hnsw":
        faiss().downcast_index(index.index).hnsw.efSearch = effort
    elif kind != "flat":
        index.nprobe = effort


def prepared(vectors: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Vectors [N, D] as the index has them: for the cosine of length 1, or 0 if they are zero."""
    if metric == "l2":
        return np.ascontiguousarray(vectors, np.float32)
    return np.ascontiguousarray(unit(vectors), np.float32)


def _bytes_of_code(dim: int) -> int:
    """A byte for eight values or more: their number must divide the dimension."""
    return max(count for count in range(1, max(1, dim // 8) + 1) if dim % count == 0)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2g} GB"
