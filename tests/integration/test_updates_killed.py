"""Killed anywhere in an update, with readers all the time: they see no id twice and miss no row
that stays, and the same command ends as a fresh extraction."""

import itertools
import shutil
import signal
import threading
import time
from collections import Counter
from random import Random
from types import SimpleNamespace

import numpy as np
import pyarrow.dataset as ds
import pytest
from changing import FEATURES, SMALL, Collection, content, every_row, parts_of
from forked import start
from later import Later
from seams import KILL_AT_STEP, UNHURRIED, after_import

from resfeat import open_dataset
from resfeat.dataset import Layout, commit, generation
from resfeat.dataset.verify import repair, verify

duckdb = Later("duckdb")
pl = Later("polars")

# After a kill each shard starts decoders of its own: a few shards will do.
CHOICES = [*FEATURES, *SMALL, "--shard-size", 8]
MORE = [pytest.mark.more]
# At the others nothing differs for whoever comes next.
TELLING = ("listed", "current", "embeddings")
STEPS = (*generation.STEPS, *commit.STEPS)


# These open a file twice. Between the two it may be replaced, and then they say this: once, since
# they can read what is there when they try again.
SAYS = {"_polars": ("PanicException", "Invalid thrift"), "_duckdb": ("TProtocolException",)}


class Readers(threading.Thread):
    """Within it the folder of embeddings is read all the time, in turn by three readers. kept: what
    must be there at every moment: of each id, the first number of its embedding."""

    def __init__(self, output, kept):
        super().__init__(daemon=True)
        self._folder, self._kept = output / "embeddings", kept
        self._over, self._base = threading.Event(), duckdb.connect(config={"threads": 1})
        self.polls, self.wrong = Counter(), list[str]()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join(60)
        assert not self.is_alive()
        for way in self._ways:  # what a dead process left is seen by each
            self._poll(way)
        self._base.close()

    @property
    def _ways(self):
        return self._pyarrow, self._duckdb, self._polars

    def run(self):
        for way in itertools.cycle(self._ways):
            if self._over.wait(0.01):
                return
            self._poll(way)

    def _poll(self, way):
        for tries_left in (2, 1, 0):
            try:
                rows = [(each, number) for each, number in way()]
                break
            except BaseException as error:
                known = any(each in repr(error) for each in SAYS.get(way.__name__, ()))
                if known and tries_left:
                    continue
                self.wrong.append(f"{way.__name__}: {error!r}")
                return
        self.polls[way.__name__] += 1
        found = dict(rows)
        if len(found) < len(rows):
            self.wrong.append(f"{way.__name__}: an id is there twice")
        if missing := self._kept.items() - found.items():
            self.wrong.append(f"{way.__name__}: without {missing}")

    def _pyarrow(self):
        table = ds.dataset(self._folder, format="parquet").to_table(columns=["id", "embedding"])
        columns = table["id"].to_pylist(), table["embedding"].to_pylist()
        return [(each, vector[0]) for each, vector in zip(*columns, strict=True)]

    def _duckdb(self):
        query = f"select id, embedding[1] from '{self._folder}/*.parquet'"
        return self._base.execute(query).fetchall()

    def _polars(self):
        every = pl.read_parquet(self._folder / "*.parquet", columns=["id", "embedding"])
        return every.select("id", pl.col("embedding").arr.get(0)).rows()


@pytest.fixture(scope="module")
def world(resfeat, tmp_path_factory):
    """A dataset in its second generation, its folder with what the third will find, and what that
    is to hold. Not to be changed."""
    folder = tmp_path_factory.mktemp("world")
    collection, output = Collection(folder / "source", 32, seed=3), folder / "out"
    command = ["extract", collection.folder, "-o", output, *CHOICES]

    def extract(*options):
        done = resfeat(*command, *options)
        assert done.returncode == 0, done.stderr

    once_changed, to_mend = sorted(collection.names)[:2]  # in the first part, which is done first
    collection.put(to_mend, is_good=False)
    extract()
    collection.put(once_changed)
    extract("--update")
    was_good, was_bad = set(collection.good), set(collection.bad)
    made = collection.change()
    collection.put(once_changed)  # no shard is listed in the files of the second generation then
    collection.put(to_mend)
    made.changed |= {once_changed, to_mend}
    assert not made.changed & (made.added | made.removed)
    fresh = folder / "fresh"
    done = resfeat("extract", collection.folder, "-o", fresh, *CHOICES)
    assert done.returncode == 0, done.stderr
    before = every_row(output)
    kept = was_good - made.to_read - made.removed
    return SimpleNamespace(
        output=output,
        before=before,
        after=every_row(fresh),
        kept={each: first_number(before["embeddings"][each]) for each in kept},
        mended=was_bad & collection.good,
        extract=lambda output, *more: [
            "extract", collection.folder, "-o", output, *CHOICES, "--max-gone", 0.2, *more
        ],
    )  # fmt: skip


def first_number(row):
    return np.frombuffer(row["embedding"], np.float32)[0].item()


def test_what_is_killed_here_has_all_fates(world, resfeat, tmp_path):
    """That the update has parts to replace and new ones, with failures and without, and prunes."""
    output = tmp_path / "out"
    shutil.copytree(world.output, output)
    lay, plan = parts_of(output), {path.name for path in Layout(output).plan.iterdir()}
    assert len(plan) == 2
    assert resfeat(*world.extract(output, "--update")).returncode == 0
    assert plan - {path.name for path in Layout(output).plan.iterdir()}
    assert every_row(output) == world.after != world.before
    assert world.mended and len(world.kept) > 10
    assert set(parts_of(output).values()) > set(lay.values())


def check_what_a_kill_left(output):
    """Nobody who looks now is told of damage, or led to throw away what is there."""
    dataset = open_dataset(output)
    found = verify(dataset)
    kinds = {each.kind for each in found.problems}
    # A part that was never there: its note is written before it.
    assert kinds <= {"unfinished", "missing"}, found.problems
    bad = [each.shard for each in found.problems if each.kind == "missing"]
    assert {*bad}.isdisjoint(dataset.layout.committed())
    assert set(repair(dataset, found)) <= set(bad)
    return found


def step_of(name):
    return pytest.param(name, marks=[] if name in TELLING else MORE)


@pytest.mark.parametrize("step", [step_of(name) for name in STEPS])
def test_killed_at_each_step(step, world, command, resfeat, tmp_path):
    output, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(world.output, output)
    kills = dict.fromkeys(["resfeat.dataset.commit", "resfeat.dataset.generation"], KILL_AT_STEP)
    hook = after_import(kills, tmp_path / "hook")
    with Readers(output, world.kept) as readers:
        killed = command(*world.extract(output, "--update"), env={**hook, "KILL_AT": step})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(readers.polls) == 3 and not readers.wrong

    is_current = step != "listed"
    rows = {folder: ids_in(output / folder) for folder in ("embeddings", "failures")}
    # At no step is an image in neither folder that was there, and is now.
    assert not world.mended - rows["embeddings"] - rows["failures"]
    found = check_what_a_kill_left(output)
    assert open_dataset(output).record.plan.generation == 1 + is_current
    assert bool(found.problems) == is_current
    told = resfeat("status", output).stdout
    complete = told.splitlines()[-1].split()
    assert complete == ["complete", "no" if is_current else "yes"]

    shutil.copytree(output, other)
    resumed = resfeat(*world.extract(other))
    assert resumed.returncode == 0, resumed.stderr
    assert "was killed: going on" in resumed.stderr
    assert every_row(other) == (world.after if is_current else world.before)
    updated = resfeat(*world.extract(output, "--update"))
    assert updated.returncode == 0, updated.stderr
    for each, generation_now in ((output, 2), (other, 1 + is_current)):
        assert verify(dataset := open_dataset(each)).problems == []
        assert dataset.record.plan.generation == generation_now
        assert not list(dataset.layout.tmp.iterdir())
    assert every_row(output) == world.after
    named = {file.name for file in open_dataset(output).record.plan.files}
    there = {path.name for path in Layout(output).plan.iterdir()}
    # What a kill left at "current" goes with the next generation.
    assert there == named or (step == "current" and there > named)
    card = (output / "README.md").read_text()
    assert f"Embeddings of {open_dataset(output).record.plan.items:,} images" in card


def ids_in(folder):
    return set(ds.dataset(folder, format="parquet").to_table(columns=["id"])["id"].to_pylist())


def test_a_kill_while_it_lists_changes_nothing(world, tmp_path):
    """Before the first step: not even a file of the plan that counts."""
    output = tmp_path / "out"
    shutil.copytree(world.output, output)
    before = content(output)
    hang = "import time\n\ndef is_listed(table):\n    time.sleep(60)\n"
    hook = after_import({"resfeat.plan.files": hang}, tmp_path / "hook")
    process = start(*world.extract(output, "--update"), env=hook)
    wait_until_it_writes(process, output)
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert content(output) == before


@pytest.mark.parametrize(
    "kills",
    [pytest.param(8, marks=pytest.mark.more), pytest.param(50, marks=pytest.mark.slow)],
)
def test_killed_at_any_moment(kills, world, resfeat, tmp_path):
    chance = Random(kills)
    hook = after_import({"resfeat.decoding.decode": UNHURRIED}, tmp_path / "hook")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(world.output, undisturbed)
    process = start(*world.extract(undisturbed, "--update"), env=hook)
    wait_until_it_writes(process, undisturbed)
    begun = time.monotonic()
    assert process.wait(60) == 0
    span, polls, deaths = time.monotonic() - begun, Counter(), 0
    assert every_row(undisturbed) == world.after
    for number in range(kills):
        output = tmp_path / f"out-{number}"
        shutil.copytree(world.output, output)
        with Readers(output, world.kept) as readers:
            process = start(*world.extract(output, "--update"), env=hook)
            wait_until_it_writes(process, output)
            time.sleep(chance.uniform(0, span))
            process.kill()
            process.wait()
            deaths += process.returncode == -signal.SIGKILL
            check_what_a_kill_left(output)
            again = ["--update"] if chance.random() < 0.5 else []
            is_current = open_dataset(output).record.plan.generation == 2
            resumed = resfeat(*world.extract(output, *again))
        assert resumed.returncode == 0, resumed.stderr
        assert not readers.wrong, number
        assert every_row(output) == (world.after if is_current or again else world.before)
        assert verify(open_dataset(output)).problems == []
        polls += readers.polls
        shutil.rmtree(output)
    assert deaths > kills / 2 and len(polls) == 3 and min(polls.values()) > 2 * kills


def wait_until_it_writes(process, output):
    """Until its name is in the lock."""
    while not Layout(output).lock.read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
