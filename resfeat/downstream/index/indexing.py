"""Making the index of a dataset, and having it follow the dataset.

A new one is trained on a sample, and then given the parts one after another. Some rows are held out
meanwhile: with them it is measured against exact search, which sees the same parts on their way.
They are added last. In memory are the index itself, the sample, and a block of a part.

One that is there already is given the rows that came and loses those that went, where its kind can
lose any and not too much has changed; only parts whose digest is another one are read. Its files
are written as drafts and then take their places; it counts once `about.json` is there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resfeat.dataset import Dataset, Parts, vector_hashes, writable
from resfeat.downstream.index.index import (
    ABOUT,
    FAISS,
    FORMAT,
    IDS,
    About,
    Index,
    digest_of,
    open_index,
)
from resfeat.downstream.index.kinds import (
    COARSE,
    CODES,
    Auto,
    Kind,
    build_bytes,
    choose,
    faiss,
    make,
    prepared,
    sample_of,
    write_index,
)
from resfeat.downstream.index.ranking import Listed, Rows, of_dataset, of_index, ranked
from resfeat.downstream.index.recall import NEAREST, Exact, measure
from resfeat.downstream.search import Metric, nearest
from resfeat.errors import ResfeatError, UsageError
from resfeat.runtimes.hardware import memory_bytes
from resfeat.storage.draft import DiskDraft

HELD_OUT = 200
# Of the rows that it was trained on, as many may come and go before it is made anew.
MOST_CHANGED = 0.2

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What index is asked for. None: as it was asked for before, or else "auto" and cosine. memory:
    bytes that building may take; by default half of the machine's."""

    layer: str | None = None
    kind: Kind | Auto | None = None
    metric: Metric | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Outcome:
    """The index that there is now, and what was done to it, in one line."""

    about: About
    done: str


def build_index(
    dataset: Dataset, wanted: Wanted | None = None, tell: Tell = lambda step: None
) -> Outcome:
    """Make the index of a layer, or bring it to what the dataset is now.

    tell: is called before each step that may take long. Raises UsageError where faiss is not
    installed, for an OUT in a store, and where there are no embeddings, ResfeatError where another
    process makes it, or the dataset changes meanwhile.
    """
    wanted = wanted or Wanted()
    faiss()
    name = dataset.layer_of(wanted.layer)
    folder = dataset.layout.index(name)
    if not isinstance(folder, Path):
        raise UsageError(
            f"{dataset.layout.root} is in a store, and FAISS reads files: copy it to a disk, and "
            "make the index there"
        )
    parts = Parts(dataset, name)
    if not parts.rows:
        raise dataset.empty()
    with writable(dataset.layout), _alone(folder):
        work = _Work(dataset, name, folder, parts, tell)
        there, why = _there(dataset, name, wanted)
        if there and not why:
            follow = _follow(work, there)
            if isinstance(follow, Outcome):
                return follow
            why = follow
        return _anew(work, _with(wanted, there), why)


def _with(wanted: Wanted, there: Index | None) -> Wanted:
    """What is asked for, and for the rest what was asked for before."""
    if not there:
        return wanted
    about = there.about
    kind = wanted.kind or (about.kind if about.asked else None)
    return replace(wanted, kind=kind, metric=wanted.metric or about.metric)


@dataclass(frozen=True)
class _Work:
    dataset: Dataset
    layer: str
    folder: Path
    parts: Parts
    tell: Tell


def _there(dataset: Dataset, layer: str, wanted: Wanted) -> tuple[Index | None, str]:
    """The index that is there, and why it cannot be brought to what is asked for."""
    index = None
    try:
        index = open_index(dataset, layer)
        if index is None:
            return None, ""
        about, identity = index.about, dataset.record.identity
        is_old = about.format != FORMAT
        if is_old or about.fingerprint != identity.fingerprint or about.layer != layer:
            return index, str(index.stale)
        if wanted.kind == "auto" and about.asked:
            return index, f"it was {about.kind} as asked for, and auto is asked for"
        for asked, now in (wanted.kind, about.kind), (wanted.metric, about.metric):
            if asked not in (None, "auto", now):
                return index, f"it was {now}, and {asked} is asked for"
        needed = build_bytes(about.kind, about.rows, about.dim)
        if wanted.memory and needed > wanted.memory:
            return index, f"as it is it may take {needed / 1e9:,.2g} GB of memory"
        index.check()
    except ResfeatError as error:  # of one that is damaged it is still known what was asked for
        return index, str(error).partition(":")[0]
    return index, ""


def _follow(work: _Work, index: Index) -> Outcome | str:
    """Do what has changed; or why the index is to be made anew."""
    about, now = index.about, work.parts.digests
    if not index.stale:
        return Outcome(about, "It is that of the dataset as it stands: nothing to do")
    if about.kind == "hnsw":
        return "nothing can be removed from a graph (hnsw)"
    touched = [shard for shard in {*about.parts, *now} if about.parts.get(shard) != now.get(shard)]
    work.tell(
        f"bringing {about.kind} of {about.rows:,} rows to what changed in {len(touched)} parts"
    )
    faiss_index, rows, listed = index.to_change(), Rows(), index.ids
    is_touched = np.isin(listed["shard"].to_numpy(), touched)
    kept = listed.filter(pa.array(~is_touched))
    removed: list[int] = []
    next_id, dim = about.next_id, about.dim
    for shard in sorted(touched):
        before = {
            (row["id"], row["hash"]): row["faiss_id"] for row in index.rows_of(shard).to_pylist()
        }
        for block in work.parts.blocks([shard] if shard in now else []):
            if block.vectors.shape[1] != dim:
                return f"its vectors have {dim:,} values, and these {block.vectors.shape[1]:,}"
            hashes = vector_hashes(block.vectors)
            keys = zip(block.ids.to_pylist(), hashes.tolist(), strict=True)
            numbers = np.array([before.pop(key, -1) for key in keys], np.int64)
            is_new = numbers < 0
            numbers[is_new] = np.arange(next_id, next_id + is_new.sum())
            next_id += int(is_new.sum())
            if is_new.any():
                vectors = prepared(block.vectors[is_new], about.metric)
                faiss_index.add_with_ids(vectors, numbers[is_new])
            rows.add(block, work.parts.starts[block.shard], numbers, hashes)
        removed += before.values()
    added = next_id - about.next_id
    changed = about.changed + added + len(removed)
    if changed > MOST_CHANGED * max(about.trained_on, about.measured.rows):
        return f"{changed:,} rows came or went since it was made, of {about.measured.rows:,}"
    if removed:
        faiss_index.remove_ids(np.array(removed, np.int64))
    table = pa.concat_tables([kept, rows.table()]).sort_by("faiss_id")
    about = replace(
        about, rows=len(table), parts=dict(now), next_id=next_id, changed=changed,
        generation=work.dataset.record.plan.generation,
    )  # fmt: skip
    about = _publish(work, faiss_index, table, about)
    some = f"{len(touched):,} of {len(now):,} parts"
    return Outcome(about, f"Updated: {added:,} rows added and {len(removed):,} removed, in {some}")


def _anew(work: _Work, wanted: Wanted, why: str) -> Outcome:
    parts, metric = work.parts, wanted.metric or "cosine"
    dim, rows = parts.dim, parts.rows
    memory = wanted.memory or memory_bytes() // 2
    asked = None if wanted.kind == "auto" else wanted.kind
    choice = choose(rows, dim, memory, asked)
    work.tell(f"making {choice.kind} of {rows:,} x {dim:,}: {choice.why}")
    index = make(choice.kind, metric, rows, dim)
    held_out, sample = _samples(choice.kind, rows, memory // (8 * 4 * dim))
    if choice.kind == "pq" and len(sample) < CODES:
        raise UsageError(
            f"pq needs {CODES} rows to train on, and of {rows:,} there are {len(sample):,}: give "
            "another --kind"
        )
    if len(sample):
        work.tell(f"training on {len(sample):,} rows")
        index.train(prepared(parts.vectors_at(sample), metric))
    work.tell(f"adding {rows:,} rows")
    queries = prepared(parts.vectors_at(held_out), metric)
    exact, listed = Exact(queries, metric), Rows()
    for block in parts.blocks():
        vectors, numbers = prepared(block.vectors, metric), block.places
        listed.add(block, parts.starts[block.shard], numbers, vector_hashes(block.vectors))
        is_in = ~np.isin(numbers, held_out)
        if is_in.any():
            index.add_with_ids(vectors[is_in], numbers[is_in])
            exact.add(vectors[is_in], numbers[is_in])
    work.tell("measuring it against exact search")
    generation = work.dataset.record.plan.generation
    table = listed.table().combine_chunks()
    finish = _finish(work, index, choice.kind, metric, Listed(table), queries)
    by_all = partial(nearest, work.dataset, queries, NEAREST, work.layer, metric)
    measured, effort = measure(index, choice.kind, exact, by_all, finish, generation)
    if len(held_out):
        index.add_with_ids(queries, held_out)
    about = About(
        layer=work.layer, kind=choice.kind, why=choice.why, asked=bool(asked), metric=metric,
        dim=dim, rows=rows, trained_on=len(sample), effort=effort, next_id=rows,
        generation=generation, fingerprint=work.dataset.record.identity.fingerprint,
        parts=dict(parts.digests), measured=measured, files={},
    )  # fmt: skip
    about = _publish(work, index, table, about)
    return Outcome(about, f"Made anew: {why}" if why else "Made")


def _finish(
    work: _Work,
    index: Any,
    kind: Kind,
    metric: Metric,
    listed: Listed,
    queries: NDArray[np.float32],
) -> Callable[[NDArray[np.float32], NDArray[np.int64]], object]:
    """What `Index.search` does with what FAISS gave it for these queries."""
    dim = queries.shape[1]
    if kind in COARSE:
        read = of_dataset(work.dataset, work.layer, listed, dim)
    elif kind == "flat":
        read = of_index(index, listed, dim)
    else:
        return lambda scores, found: listed.ordered(scores, found, metric)

    def finish(scores: NDArray[np.float32], found: NDArray[np.int64]) -> None:
        is_there = (found >= 0).any(axis=1)  # a query whose lists are empty has none
        ranked(listed, queries[is_there], found[is_there], 1, metric, read)

    return finish


def _samples(kind: Kind, rows: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of rows to hold out and of rows to train on, none in both, both ascending."""
    queries = min(HELD_OUT, rows // 5)
    sample = min(sample_of(kind, rows), max(1, rows - queries), max(1, most))
    picked = np.random.default_rng(0).choice(rows, queries + sample, replace=False)
    return np.sort(picked[:queries]), np.sort(picked[queries:])


def _publish(work: _Work, index: Any, listed: pa.Table, about: About) -> About:
    """Put an index in its place."""
    work.parts.check()
    work.tell("writing it")
    drafts = {name: DiskDraft(work.folder, name) for name in (FAISS, IDS, ABOUT)}
    try:
        write_index(index, drafts[FAISS].sink)
        pq.write_table(listed, drafts[IDS].sink, compression="zstd")
        about = replace(about, files={name: digest_of(drafts[name].sink) for name in (FAISS, IDS)})
        drafts[ABOUT].sink.write_text(json.dumps(about.as_json(), indent=2) + "\n")
        # Until the last is in place there is none: never one with the ids of another.
        (work.folder / ABOUT).unlink(missing_ok=True)
        for name, draft in drafts.items():
            draft.publish(work.folder / name)
    finally:
        for draft in drafts.values():
            draft.discard()
    return about


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder of an index, made if it is not there, for this process alone. Drafts that a killed
    one left are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResfeatError(
                f"another process is making the index in {folder}: wait for it"
            ) from error
        for leftover in folder.glob("*-*.*"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
