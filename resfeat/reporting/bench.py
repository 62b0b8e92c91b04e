"""How fast each stage is on this machine, alone and together, on the user's own images."""

import itertools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import numpy as np

from resfeat.backbones.weights import Weights, resolve
from resfeat.dataset import Layout, Part, Record, Row
from resfeat.decoding.decode import Picture, decode
from resfeat.errors import Failure, UsageError
from resfeat.fidelity import calibrate
from resfeat.plan import write_plan
from resfeat.reporting import limits, versions
from resfeat.runtimes import check
from resfeat.sources import Item, Listing, Run, listing, runs, table_of
from resfeat.spec import FeatureSpec, RuntimeOptions, SourceOptions
from resfeat.worker import CORES_FED, SHARDS_IN_HAND, Job, Placement, Task
from resfeat.worker.shard import process_shard
from resfeat.worker.worker import Worker, forward, network_for, place_here

# Each stage alone is repeated for at least this long.
SECONDS = 3.0
# A shard of the whole job: small enough that several follow each other.
SHARD = 128


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Images a second of each stage alone, on all the threads that it has, and of the whole job."""

    images: int
    failed: int
    megapixels: float  # of an image, in the mean
    kilobytes: float  # likewise
    placement: Placement
    precision: str
    read: float
    decode: float
    forward: float
    write: float
    whole: float
    waited: float  # share of its time, 0 to 1, that the model waited in the whole job
    sentence: str  # what limits it


def bench(
    sources: Sequence[str],
    features: FeatureSpec,
    options: RuntimeOptions,
    source_options: SourceOptions,
    images: int,
    on_step: Callable[[str], None] = lambda step: None,
) -> Bench:
    """Measure on about so many of the images below the sources; one worker, in this process. Raises
    UsageError where none of them can be used, and whatever `extract` raises for the choices."""
    check(options, features.model, features.precision)
    there = listing(sources, source_options)
    items = _spread(there, images)
    on_step("building the model")
    weights = resolve(features)
    rates = {}
    with _dataset(there, items, source_options, weights, on_step) as (layout, record):
        job = Job.of(layout, record, weights.dims)
        placement = place_here(options, job.identity)
        network = network_for(job, placement, weights.tensors)
        with closing(Worker(job, placement, network)) as worker:
            on_step("reading")
            contents, rates["read"] = _read(worker, items)
            on_step("decoding")
            pictures, rates["decode"] = _decode(worker, contents)
            on_step("the forward pass")
            rates["forward"] = _forward(worker, pictures)
            on_step("writing")
            rates["write"] = _write(worker, layout, items, len(record.plan.shards))
            on_step("the whole job")
            started = time.perf_counter()
            busy: Counter[str] = Counter()
            with ThreadPoolExecutor(SHARDS_IN_HAND) as pool:
                tasks = map(Task, record.plan.shards.values())
                for result in pool.map(partial(process_shard, worker), tasks):
                    busy.update(result.seconds)
            whole = len(items) / (time.perf_counter() - started)
    return Bench(
        images=len(items),
        failed=len(items) - len(pictures),
        megapixels=float(np.mean([each.width * each.height for each in pictures])) / 1e6,
        kilobytes=float(np.mean([len(each) for each in contents])) / 1e3,
        placement=replace(placement, batch_size=worker.fits),
        precision=features.precision,
        **rates,
        whole=whole,
        waited=limits.waited(busy),
        sentence=_sentence(rates, whole, placement, features.precision),
    )


def _spread(listing: Iterable[Item], wanted: int) -> list[Item]:
    """At least `wanted` items of any listing that has them, evenly spread, and under twice that."""
    kept: list[Item] = []
    every = 1
    for number, item in enumerate(listing):
        if number % every == 0:
            kept.append(item)
        if len(kept) == 2 * wanted:
            kept, every = kept[::2], 2 * every
    if not kept:
        raise UsageError("no images there: name a folder that holds some")
    return kept


@contextmanager
def _dataset(
    there: Listing,
    items: Sequence[Item],
    source_options: SourceOptions,
    weights: Weights,
    on_step: Callable[[str], None],
) -> Iterator[tuple[Layout, Record]]:
    """A dataset of these items that is about to be extracted, and is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="resfeat-bench-") as folder:
        layout = Layout(folder)
        for each in layout.folders:
            each.mkdir(parents=True)
        carried = there.carried
        record = Record(
            identity=weights.identity,
            weights=weights.origin,
            sources=tuple(there.roots),
            source_options=source_options,
            plan=write_plan(layout.plan, layout.tmp, [table_of(items, carried)], SHARD, carried),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
        )
        if record.identity.precision == "int8":
            on_step("calibrating int8")
            record = calibrate(layout, record, weights, lambda note: None)
        yield layout, record


def _rate(count: int, once: Callable[[], object]) -> float:
    """Images a second, where one call does `count`: the mean over `SECONDS` after a first call."""
    once()
    calls, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < SECONDS:
        once()
        calls += 1
    return count * calls / spent


def _read(worker: Worker, items: Sequence[Item]) -> tuple[list[bytes], float]:
    """The bytes of the files that can be read, and how fast that was, once."""
    started = time.perf_counter()
    every = runs(items, range(len(items)), len(items))
    contents = list(itertools.chain.from_iterable(worker.loaders.map(Run.read, every)))
    rate = len(items) / (time.perf_counter() - started)
    whole = [content[0] for content in contents if not isinstance(content, Failure)]
    if not whole:
        raise UsageError(f"none of {len(items)} sampled files can be read: are these images?")
    return whole, rate


def _decode(worker: Worker, contents: Sequence[bytes]) -> tuple[list[Picture], float]:
    pixels, way = worker.job.identity.preprocessing, worker.job.identity.decode
    given: list[Picture | Failure] = []

    def once() -> None:
        given[:] = pool.map(lambda data: decode(data, pixels, way), contents)

    with ThreadPoolExecutor(worker.placement.cpus) as pool:
        rate = _rate(len(contents), once)
    pictures = [each for each in given if isinstance(each, Picture)]
    if not pictures:
        raise UsageError(f"none of {len(contents)} sampled files can be decoded: are these images?")
    return pictures, rate


def _forward(worker: Worker, pictures: Sequence[Picture]) -> float:
    size, passes = worker.placement.batch_size, 2 * worker.forward_threads
    batch = worker.runtime.empty((size, *pictures[0].pixels.shape))
    batch[:] = [each.pixels for each in itertools.islice(itertools.cycle(pictures), size)]

    def once() -> object:
        return list(worker.forwards.map(partial(forward, worker), [batch] * passes))

    return _rate(size * passes, once)


def _write(worker: Worker, layout: Layout, items: Sequence[Item], planned: int) -> float:
    some = items[:SHARD]
    shards = itertools.count(planned)  # none of those that the whole job is to do
    rows = [
        Row(item.id, 1, 1, item.size or 0, item.mtime, item.label, item.carried) for item in some
    ]
    chance = np.random.default_rng(0)
    shape = len(some), sum(worker.job.dims.values())
    vectors = chance.random(shape, np.float32).astype(worker.job.identity.dtype)

    def once() -> None:
        with Part(layout, next(shards), worker.schema(None)) as part:
            part.add(rows, vectors)
            part.commit(item.id for item in some)

    return _rate(len(some), once)


def _sentence(rates: dict[str, float], whole: float, placement: Placement, precision: str) -> str:
    """What limits the job: the slowest stage, or, where all share the same cores, the one that
    takes most of them."""
    slowest, second = sorted(rates, key=lambda stage: rates[stage])[:2]
    names = {"forward": "the model", "read": "reading", "decode": "decoding", "write": "writing"}
    cores = f"{placement.cpus} CPU cores"
    where = {
        "forward": f"on {placement.runtime}, {'a GPU' if placement.device == 'cuda' else cores}",
        "decode": f"on {cores}",
        "read": "from these files",
        "write": "to the folder for temporary files",
    }
    told = (
        f"The limit is {names[slowest]}: {rates[slowest]:,.0f} images/s {where[slowest]}, and "
        f"{names[second]} could do {rates[second]:,.0f}; all together reach {whole:,.0f}. "
        f"Faster with {limits.helps(slowest, placement.device, precision, placement.cpus)}."
    )
    # With more cores than one process feeds, so many workers would have other shares of them.
    if placement.device == "cuda" and placement.cpus <= CORES_FED:
        workers = math.ceil((1 - limits.WAITING) * rates["forward"] / whole)
        told += f" {workers} such workers would keep a GPU busy." if workers > 1 else ""
    return told
