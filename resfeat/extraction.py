"""Images to embeddings, the whole story: list → plan → shards → workers → report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from resfeat import engines, runtimes, sources
from resfeat.backbones import check_name
from resfeat.dataset import ALL, Layout, writable
from resfeat.engines.cluster import Cluster
from resfeat.errors import ResfeatError, Stopped, UsageError
from resfeat.keywords import Address, ExtractKeywords, check_names, extract_spec
from resfeat.plan import Partition
from resfeat.reporting import Preview, Progress, Report, Watch
from resfeat.run import Request, Run, begin, previewed
from resfeat.runtimes.importing import without_collection
from resfeat.spec import ExtractSpec
from resfeat.storage import public
from resfeat.worker import Job

if TYPE_CHECKING:
    from resfeat.engines import Engine
    from resfeat.fidelity import Reference


class Watching(TypedDict, total=False):
    """What `extract` tells and asks while it runs. options: the command's own, and where each came
    from, which go into the report."""

    options: Mapping[str, Mapping[str, Any]]
    on_note: Callable[[str], None]
    on_step: Callable[[str], None]
    on_progress: Callable[[Progress], None]
    stopping: Callable[[], bool]


class Options(ExtractKeywords, Watching, total=False):
    """All that `extract` takes by keyword."""


@overload
def extract(spec: ExtractSpec, /, **watching: Unpack[Watching]) -> Report: ...


@overload
def extract(
    sources: Address | Sequence[Address], /, output: Address, **options: Unpack[Options]
) -> Report: ...


def extract(what: Any, /, output: Address | None = None, **options: Any) -> Report:
    """Bring a dataset to completion, from wherever it stands. Two ways to say which:

        extract("photos", "embeddings", model="resnet18", workers=0)
        extract(ExtractSpec(sources=("photos",), output="embeddings"))

    The keywords of the first are the fields of `ExtractSpec` and of `RuntimeOptions`. Both ways
    take four more. `on_note` is told, a line each, what a user should know of how the run was set
    up; the report has the same. `on_step` is told what is being done before it takes long.
    `on_progress` is called about twice a second. Another thread may call these three, but never two
    at a time. Once `stopping` gives true, which several threads may ask, shards in hand are
    finished if that takes no longer than `engines.DRAIN_SECONDS`, and the report's status is
    "interrupted".

    Raises UsageError for what cannot be carried out as it was asked for, Stopped where it was
    stopped before there was a plan, and ResfeatError where the run cannot begin or go on. What is
    committed by then stays, and the same call resumes.
    """
    is_spec = isinstance(what, ExtractSpec)
    known = Watching.__annotations__ if is_spec else Options.__annotations__
    check_names("extract(spec)" if is_spec else "extract()", options, known)
    given = options.pop("options", {})
    asked = Watching.__annotations__.keys() & options
    watch = Watch(**{name.removeprefix("on_"): options[name] for name in asked}).in_turn()
    if is_spec == (output is not None):
        raise UsageError("extract takes sources and an output, or an ExtractSpec alone")
    spec = what if output is None else extract_spec(what, output, options)
    return _extracted(spec, watch, given)


def _extracted(spec: ExtractSpec, watch: Watch, options: Mapping[str, Mapping[str, Any]]) -> Report:
    started = time.monotonic()
    watch.step(f"looking at {', '.join(map(public, spec.sources))}")
    request = replace(_request(spec, watch, started), options=options)
    with engines.prepare(spec.runtime, watch.step) as cluster:
        if request.has_work() and cluster:
            cluster.begin()  # and meanwhile torch is imported, the weights read, the sources listed
        watch.step(f"loading {spec.model} with weights {public(spec.weights)}")
        with without_collection():
            from resfeat.backbones.weights import resolve

        with begin(request, resolve(spec)) as run:
            error = None
            try:
                if run.tally.todo:
                    _embed(run, cluster)
            except ResfeatError as raised:
                error = raised
            return run.end(error)


def preview(
    spec: ExtractSpec,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Preview:
    """What `extract` would do, found out without writing anything. The sources are listed where it
    would list them. Raises as it does."""
    from resfeat.backbones.weights import resolve

    watch = Watch(step=on_step, progress=on_progress, stopping=stopping)
    request = _request(spec, watch, time.monotonic())
    watch.step(f"loading {spec.model} with weights {public(spec.weights)}")
    return previewed(request, resolve(spec))


def _request(spec: ExtractSpec, watch: Watch, started: float) -> Request:
    """The request, once all that can be told at once is known to be in order."""
    partition = None if spec.partition is None else Partition.parse(spec.partition)
    layout = Layout(spec.output, partition.share if partition else ALL)
    listing = sources.listing(spec.sources, spec.source_options)
    request = Request(spec, layout, listing, watch, started, partition)
    with writable(layout):
        request.check_free()
    request.check_sources()
    check_name(spec.model)
    runtimes.check(spec.runtime, spec.model, spec.precision)
    return request


def _embed(run: Run, cluster: Cluster | None) -> None:
    """Do the shards that are to be done, by workers that are held against the reference before the
    first is committed."""
    spec, tally, watch = run.request.spec, run.tally, run.request.watch
    with ThreadPoolExecutor(1, "parity") as aside:
        expected = _expected(run, aside)
        if run.record.identity.precision == "int8":
            _calibrate(run)
        if cluster:
            cluster.ready(watch.stopping)
        if watch.stopping():
            raise Stopped("stopped before the first worker was started")
        watch.step("starting the workers")
        job = Job.of(run.layout, run.record, run.weights.dims, run.lock.token)
        with engines.start(spec.runtime, job, run.weights, len(tally.todo), cluster) as engine:
            tally.engine = engine.description
            # Before it is known how near they are, nothing is committed.
            parity = aside.submit(_proven, run, engine, expected)

            def show(done: int, failed: int, workers: int, soonest: float | None) -> None:
                run.lock.check()
                tally.show(done, failed, workers, soonest)

            for result in engine.run(run.tasks(parity), show, watch.stopping):
                tally.add(result)


def _expected(run: Run, aside: ThreadPoolExecutor) -> Callable[[], Reference | None]:
    """What gives the reference. Where that is sure to be wanted it is begun at once, since
    calibration and the start of workers leave cores idle."""
    from resfeat.fidelity import reference

    embed = partial(reference, run.layout, run.record, run.weights.tensors)
    is_sure = run.record.identity.precision != runtimes.REFERENCE
    return aside.submit(embed).result if is_sure else embed


def _calibrate(run: Run) -> None:
    """See to it that the dataset has its int8 network."""
    from resfeat.fidelity import calibrate

    watch = run.request.watch
    watch.step("calibrating int8")
    with run.settling() as layout:
        run.record = calibrate(
            layout, run.record, run.weights, run.tally.note, partial(_calibrating, watch)
        )


def _calibrating(watch: Watch, used: int, wanted: int) -> None:
    if watch.stopping():
        raise Stopped("stopped while int8 was calibrated")
    watch.progress(Progress(wanted, used, doing="calibrating"))


def _proven(
    run: Run, engine: Engine, expected: Callable[[], Reference | None]
) -> Mapping[str, float] | None:
    """What rows are to say of how near they are to the reference, once the workers are known to be
    near enough."""
    from resfeat.fidelity import differs

    if differs(run.record.identity, engine.placement):
        _prove(run, engine, expected)
    return run.record.parity


def _prove(run: Run, engine: Engine, expected: Callable[[], Reference | None]) -> None:
    """Check that the workers are near enough to the reference, and write down how near."""
    from resfeat.fidelity import check, compare

    identity, watch = run.record.identity, run.request.watch
    if watch.stopping():
        raise Stopped("stopped before a sample was compared with fp32")
    watch.step("comparing a sample with fp32")
    if (sample := expected()) is None:
        return
    given = engine.embed(sample.pictures, watch.stopping)
    run.tally.parity = parity = compare(given, sample, identity, run.weights.dims)
    if parity is None:
        return
    check(parity, identity, run.request.spec.min_parity)
    if run.record.parity is None:
        with run.settling() as layout:
            if run.record.parity is None:
                run.record = replace(run.record, parity=vars(parity))
                run.record.save(layout)
    if identity.precision != runtimes.REFERENCE:  # else nobody asked for it; the report has it
        run.tally.note(
            f"{identity.precision} on {run.tally.engine['runtime']} against fp32 on torch, "
            f"{parity.images} of the images: cosine {parity.minimum:.6f} at the least, "
            f"{parity.median:.6f} in the median"
        )
