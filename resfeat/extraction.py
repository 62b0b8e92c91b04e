"""Images to embeddings, the whole story: list → plan → shards → workers → report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from resfeat import engines, sources
from resfeat.dataset import Dataset, Layout, Lock, Record, run_lock, write_json
from resfeat.errors import ResfeatError, Stopped, StoreError, UsageError
from resfeat.plan import Shard, write_plan
from resfeat.reporting.report import Report, versions
from resfeat.reporting.tally import Progress, Tally
from resfeat.runtimes import REFERENCE
from resfeat.runtimes import check as check_runtime
from resfeat.sources import Listing
from resfeat.sources.item import Item
from resfeat.sources.rules import printable
from resfeat.spec import ExtractSpec, Identity
from resfeat.storage import Location, remove_all
from resfeat.worker import SHARDS_IN_HAND

if TYPE_CHECKING:
    from resfeat.backbones.weights import Weights
    from resfeat.engines.cluster import Cluster

LISTED_BETWEEN_CALLS = 10_000


def extract(
    spec: ExtractSpec,
    *,
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Report:
    """Bring the dataset at `spec.output` to completion, from wherever it stands.

    `on_note` is told, a line each, what a user should know of how the run was set up; the report
    has the same. `on_progress` is called about twice a second. Once `stopping` gives true, shards
    in hand are finished if that takes no longer than `engines.DRAIN_SECONDS`, and the report's
    status is "interrupted".

    Raises UsageError where the spec cannot be carried out, Stopped where it was stopped before
    there was a plan, and ResfeatError where the run cannot begin or go on. What is committed by
    then stays, and the same call resumes.
    """
    started = time.monotonic()
    layout = Layout(spec.output)
    listing = sources.listing(spec.sources, spec.label_from)
    with _writable(layout):
        _check_free(layout, listing)
    check_runtime(spec.runtime, spec.model, spec.precision)
    with engines.prepare(spec.runtime) as cluster:
        if cluster and _has_work(layout, spec):
            cluster.begin()  # and meanwhile torch is imported, the weights read, the sources listed
        return _run(spec, layout, listing, cluster, started, on_note, on_progress, stopping)


def _run(
    spec: ExtractSpec,
    layout: Layout,
    listing: Listing,
    cluster: Cluster | None,
    started: float,
    on_note: Callable[[str], None],
    on_progress: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> Report:
    from resfeat.backbones.weights import resolve

    weights = resolve(spec)
    with _output(layout, on_note) as lock:
        record = Record.load(layout)
        if new := record is None:
            record = _make_plan(layout, spec, listing, weights, on_progress, stopping)
        _check_same(layout, record, spec, listing, weights)
        tally = Tally(record.plan, _todo(layout, record, spec), on_progress, started, on_note)
        for note in (*_of_the_last(lock), *weights.notes):
            tally.note(note)
        error = None
        try:
            if tally.todo:
                _embed(spec, layout, record, weights, cluster, lock, tally, stopping)
        except ResfeatError as raised:
            if isinstance(raised, StoreError) and not layout.tmp:
                raise  # how it went is for the store to know, which is out of reach
            error = raised
        finally:
            if new and tally.todo and not tally.began and not lock.taken.is_set():
                layout.spec.unlink()  # nothing was tried, so nothing is left behind
        if error and not layout.spec.exists():
            raise error
        report = tally.report(Dataset(layout, record), listing.skipped, error)
        _save(layout, report)
    if report.status == "failed":
        raise ResfeatError(report.error) from error
    return report


def _embed(
    spec: ExtractSpec,
    layout: Layout,
    record: Record,
    weights: Weights,
    cluster: Cluster | None,
    lock: Lock,
    tally: Tally,
    stopping: Callable[[], bool],
) -> None:
    """Do the shards that are to be done, by workers that were first held against the reference."""
    from resfeat.fidelity.calibration import calibrate
    from resfeat.fidelity.parity import SAMPLE, compare, differs, reference
    from resfeat.fidelity.sample import sample

    if record.identity.precision == "int8":
        record = calibrate(layout, record, weights, tally.note)
    items = sample(layout, record.plan, SAMPLE)
    expected = reference(record.identity, weights.tensors, items)
    if cluster:
        cluster.ready(stopping)
    if stopping():
        raise Stopped("stopped before the first worker was started")
    with engines.start(spec.runtime, layout, record, weights, tally.todo, cluster) as engine:
        tally.engine = engine.description
        if expected and differs(record.identity, engine.placement):
            given = engine.embed(expected.pictures, stopping)
            tally.parity = compare(given, expected, record.identity, weights.dims)
            _prove(tally, layout, record, spec.min_parity)

        def show(done: int, failed: int, workers: int) -> None:
            lock.check()
            tally.show(done, failed, workers)

        suspects = _suspects(layout, record, lock, tally.todo)
        for result in engine.run(tally.todo, suspects, show, stopping):
            tally.add(result)


def _suspects(layout: Layout, record: Record, lock: Lock, todo: Sequence[Shard]) -> set[Shard]:
    """Shards that may hold what kills a decoder: what the last run had in hand when it was killed,
    and those that are done once more although they are known to."""
    dataset, again = Dataset(layout, record), set(layout.committed())
    killers = {"decoder_crash", "timeout"}
    known = {
        shard
        for shard in todo
        if shard.number in again and killers.intersection(dataset.reasons_in(shard.number))
    }
    if not lock.killed:
        return known
    # Of shards that are done once more it cannot be told which that run had come to.
    return known | {s for s in todo if s.number in again} | set(todo[:SHARDS_IN_HAND])


def _of_the_last(lock: Lock) -> list[str]:
    """What there is to say of the run before."""
    if lock.killed is None:
        return []
    return [f"the last run ({lock.killed}) was killed: going on from what it had committed"]


def _has_work(layout: Layout, spec: ExtractSpec) -> bool:
    record = Record.load(layout)
    return record is None or bool(_todo(layout, record, spec))


def _todo(layout: Layout, record: Record, spec: ExtractSpec) -> list[Shard]:
    """Shards that are not done, and, where that is asked for, those with failures."""
    again = set(layout.with_failures()) if spec.retry_failed else set()
    done = set(layout.committed()) - again
    return [shard for number, shard in record.plan.shards.items() if number not in done]


def _make_plan(
    layout: Layout,
    spec: ExtractSpec,
    listing: Listing,
    weights: Weights,
    on_progress: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> Record:
    """List the sources, freeze the listing, and write down what the dataset is."""
    remove_all(layout.plan)  # of a run that was killed while it was listing
    layout.plan.mkdir()

    def watched() -> Iterator[Item]:
        for number, item in enumerate(listing, start=1):
            if number % LISTED_BETWEEN_CALLS == 0:
                on_progress(Progress(None, number, 0, 0))
                if stopping():
                    raise Stopped("stopped while listing: nothing was written")
            yield item

    plan = write_plan(layout.plan, layout.tmp, watched(), spec.shard_size)
    if not plan.items:
        skipped = ", ".join(f"{count} {kind}" for kind, count in listing.skipped.most_common(3))
        raise UsageError(
            f"no images in {', '.join(spec.sources)}"
            + (f" (passed over: {skipped})" if skipped else "")
            + ": name a folder that holds some"
        )
    record = Record(
        identity=weights.identity,
        weights=weights.origin,
        sources=tuple(listing.roots),
        label_from=spec.label_from,
        plan=plan,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )
    record.save(layout)
    return record


def _prove(tally: Tally, layout: Layout, record: Record, least: float | None) -> None:
    """Write down how near the run is to the reference, if that is near enough."""
    from resfeat.fidelity.parity import check

    parity = tally.parity
    if parity is None:
        return
    check(parity, record.identity, least)
    if record.parity is None:
        replace(record, parity=vars(parity)).save(layout)
    if record.identity.precision == REFERENCE:
        return  # nobody asked for anything else; the report has it
    tally.note(
        f"{record.identity.precision} on {tally.engine['runtime']} against fp32 on torch, "
        f"{parity.images} of the images: cosine {parity.minimum:.6f} at the least, "
        f"{parity.median:.6f} in the median"
    )


def _check_same(
    layout: Layout, record: Record, spec: ExtractSpec, listing: Listing, weights: Weights
) -> None:
    """Refuse to mix two kinds of embeddings, or two listings, in one dataset."""
    there = _choices(record.identity) | {
        "sources": record.sources,
        "label_from": record.label_from,
        "shard_size": record.plan.shard_size,
    }
    asked = _choices(weights.identity) | {
        "sources": tuple(listing.roots),
        "label_from": spec.label_from,
        "shard_size": spec.shard_size or record.plan.shard_size,
    }
    for name in there:
        if there[name] != asked[name]:
            raise UsageError(
                f"{layout.root} was made with another {name}: {_brief(there[name])} there, "
                f"{_brief(asked[name])} now (weights {record.weights} there, "
                f"{weights.origin} now); repeat its choices to resume it, or give a new -o"
            )


def _choices(identity: Identity) -> dict[str, object]:
    """The identity's fields, those of the preprocessing among them."""
    plain = identity.as_dict()
    pixels: dict[str, object] = plain.pop("preprocessing")
    return plain | pixels


def _brief(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _check_free(layout: Layout, listing: Listing) -> None:
    """Refuse an output that is something else."""
    root = layout.root
    if printable(str(root)) != str(root):
        raise UsageError(f"output {printable(str(root))} has bytes that are not UTF-8: rename it")
    if str(root) in listing.roots:
        raise UsageError(f"output {root} is also a source: give a folder of its own")
    if not root.exists():
        return
    if not root.is_dir():
        raise UsageError(f"output {root} is a file: give a folder")
    if not layout.private.exists() and any(root.iterdir()):
        raise UsageError(
            f"output {root} holds other files: give a new folder, or that of a dataset to resume"
        )


@contextmanager
def _output(layout: Layout, on_note: Callable[[str], None]) -> Iterator[Lock]:
    """The output folder, made if it is not there, with its lock held.

    Where it ends without a record, what it made is removed again.
    """
    made: list[Path] = []
    with _writable(layout):
        try:
            if isinstance(layout.root, Path):
                every = [layout.root, *layout.root.parents]
                made += [folder for folder in every if not folder.exists()]
            for folder in layout.folders:
                folder.mkdir(parents=True, exist_ok=True)
            with run_lock(layout, on_wait=on_note) as lock:
                try:
                    _tidy(layout)  # of what a killed run left
                    yield lock
                finally:
                    if not lock.taken.is_set():  # else it is another's
                        _tidy(layout)  # of what workers left that were killed or stopped
                        if not layout.spec.exists():
                            remove_all(layout.private)
                            _remove_empty([layout.embeddings, *made])
        except OSError:
            _remove_empty(made)
            raise


@contextmanager
def _writable(layout: Layout) -> Iterator[None]:
    """Say of what goes wrong with the output's folders what can be done about it."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise ResfeatError(
            f"cannot write to {layout.root}: {error.strerror or error}; give a folder that can be "
            "written, with space left, and the same command again"
        ) from error


def _tidy(layout: Layout) -> None:
    leftovers: list[Location] = list(layout.tmp.iterdir()) if layout.tmp else []
    committed = set(layout.committed())
    leftovers += [
        layout.replaced / layout.part_name(shard)
        for shard in layout.set_aside()
        if shard in committed
    ]
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)


def _remove_empty(folders: Sequence[Location]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _save(layout: Layout, report: Report) -> None:
    # A disk too full for the report must not hide the error that the report is about.
    with suppress(OSError) if report.error else nullcontext():
        write_json(layout, layout.run_report(report.run_id), report.as_dict())
