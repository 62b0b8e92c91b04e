"""One run: what it goes on from, what it takes care with, and what it leaves when it fails."""

import json
import os
import shutil
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from resfeat import ExtractSpec, RuntimeOptions, engines, extract, open_dataset
from resfeat.dataset import Layout, Record
from resfeat.dataset.lock import run_lock
from resfeat.dataset.notes import Note
from resfeat.dataset.writer import Lock, Writer
from resfeat.decoding import decode
from resfeat.engines import inline, pool
from resfeat.errors import ResfeatError, UsageError
from resfeat.reporting import Watch
from resfeat.run import Run
from resfeat.sources.directory import Directories
from resfeat.worker import worker

IMAGES = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dozen small pictures in two folders. Not to be changed."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(IMAGES):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 40), 60).convert("RGB").save(path)
    return folder


def spec(source, output, **changes):
    """A network and pictures that take milliseconds, in this process."""
    asked = ExtractSpec(
        resize=8,  # bf16 on a CPU without instructions for it takes seconds
        crop=8,
        sources=(str(source),),
        output=str(output),
        model="cifar_resnet20",
        weights="random:0",
        shard_size=4,
        runtime=RuntimeOptions(workers=0, runtime="torch"),
    )
    return replace(asked, **changes)


def run(source, output, **changes):
    return extract(spec(source, output, **changes))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """The pictures, extracted. Not to be changed."""
    output = tmp_path_factory.mktemp("finished")
    assert run(source, output, label_from="parent").embedded == IMAGES
    return output


def test_a_run_whose_time_is_too_short_for_a_shard_says_so_early(source, tmp_path, monkeypatch):
    """40,000 images of a tenth of a second and more on one core, and 20 minutes."""

    def slow(*arguments):
        time.sleep(0.1)
        return decode(*arguments)

    monkeypatch.setattr(worker, "decode", slow)
    monkeypatch.setattr(pool, "DRAIN_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + 1200:.0f}")
    table, picture = tmp_path / "images.csv", next(source.rglob("*.png"))
    table.write_text("\n".join(["uri,key", *(f"{picture},{n}" for n in range(40_000))]))
    one = RuntimeOptions(workers=0, runtime="torch", cpus_per_worker=1)
    asked = spec(table, tmp_path / "out", shard_size=40_000, runtime=one, id_column="key")
    notes, shown = [], []
    report = extract(asked, on_note=notes.append, on_progress=shown.append,
                     stopping=lambda: bool(notes))  # fmt: skip
    assert report.status == "interrupted" and report.notes[:1] == notes[:1]
    assert "no shard will be done in the time of this job" in notes[0]
    assert "smaller --shard-size" in notes[0]
    assert 0 < shown[-1].done < 1000


def test_failures_are_tried_once_more_each_however_often_that_is_stopped(
    source, tmp_path, monkeypatch, resfeat
):
    """Three shards, with a failure each. Then, as nothing was stopped, all are tried anew."""
    folder, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, folder)
    for number in (0, 10, 11):
        (folder / "ab"[number % 2] / f"{number:02}.png").write_bytes(b"no image")
    assert run(folder, output).failed == 3
    done, do = [], inline.process_shard
    monkeypatch.setattr(inline, "process_shard", lambda *what: done.append(what) or do(*what))
    monkeypatch.setattr(pool, "SHARDS_IN_HAND", 1)
    for times in (1, 2):
        before = len(done)
        report = extract(spec(folder, output, retry_failed=True),
                         stopping=lambda before=before: len(done) > before)  # fmt: skip
        assert (report.status, report.shards, len(report.retried)) == ("interrupted", 1, times)
        told = json.loads(resfeat("status", output, "--json").stdout)
        assert (told["shards_committed"], told["retried"]) == (3, times)
    report = run(folder, output, retry_failed=True)
    assert (report.status, report.shards, report.retried) == ("finished", 1, [])
    assert "the last run did 2 shards and was stopped: what failed" in report.notes[0]
    assert len({task.shard for _, task in done}) == len(done) == 3
    report = run(folder, output, retry_failed=True)
    assert (report.shards, report.notes) == (3, [])


def test_labels_are_those_of_the_folders_and_belong_to_the_dataset(source, finished):
    rows = open_dataset(finished).embeddings.to_table().to_pylist()
    assert {row["id"]: row["label"] for row in rows} == {
        f"{'ab'[number % 2]}/{number:02}.png": "ab"[number % 2] for number in range(IMAGES)
    }
    with pytest.raises(UsageError, match="made with another label_from: parent there, None now"):
        run(source, finished)


def no_worker(*_):
    raise ResfeatError("Ray could not start a worker within 180 s")


def test_a_finished_listing_is_kept_where_no_worker_comes_up(source, tmp_path, monkeypatch):
    """It may have taken hours."""
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(engines, "start", no_worker)
        with pytest.raises(ResfeatError, match="could not start a worker"):
            run(source, output)
    layout = Layout(output)
    listed = (layout.plan / "plan-00000.parquet").stat().st_mtime_ns
    (failed,) = open_dataset(output).runs()
    assert json.loads(failed.read_text())["status"] == "failed"

    monkeypatch.setattr(Directories, "tables", None)  # not listed again
    assert run(source, output).embedded == IMAGES
    assert (layout.plan / "plan-00000.parquet").stat().st_mtime_ns == listed


def test_a_listing_of_which_nothing_is_committed_binds_nobody(source, tmp_path, monkeypatch):
    """Whoever mistook an option may give another model, and does not list again."""
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(engines, "start", no_worker)
        with pytest.raises(ResfeatError):
            run(source, output)
    layout = Layout(output)
    listed = (layout.plan / "plan-00000.parquet").stat().st_mtime_ns
    assert run(source, output, model="cifar_resnet32").embedded == IMAGES
    assert (layout.plan / "plan-00000.parquet").stat().st_mtime_ns == listed
    assert open_dataset(output).record.identity.model == "cifar_resnet32"
    about, columns, failures = layout.card.read_text().split("| column of ")
    assert "cifar_resnet32" in about
    assert "`width`" in columns and "`reason`" not in columns and "`reason`" in failures
    with pytest.raises(UsageError, match="made with another model"):  # now it does
        run(source, output)

    other = tmp_path / "other"
    with monkeypatch.context() as patched:
        patched.setattr(engines, "start", no_worker)
        with pytest.raises(ResfeatError):
            run(source, other)
    assert run(source / "a", other).items == IMAGES // 2  # another listing is another plan


@pytest.mark.parametrize(
    "there", ["nothing", pytest.param("an empty folder", marks=pytest.mark.more)]
)
def test_a_choice_that_does_not_work_out_leaves_nothing(there, source, tmp_path):
    """With another precision the dataset would be another one."""
    output = tmp_path / "deep" / "out"
    if there != "nothing":
        output.mkdir(parents=True)
    with pytest.raises(ResfeatError, match="under --min-parity 1"):
        run(source, output, precision="bf16", min_parity=1)
    assert (tmp_path / "deep").exists() == (there != "nothing")
    assert not output.exists() or not list(output.iterdir())


@pytest.mark.more  # four runs in bf16, of seconds each
def test_it_leaves_a_dataset_that_was_there_before(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(engines, "start", no_worker)
    with pytest.raises(ResfeatError):
        run(source, output, precision="bf16")
    monkeypatch.undo()
    with pytest.raises(ResfeatError, match="under --min-parity 1"):
        run(source, output, precision="bf16", min_parity=1)
    assert run(source, output, precision="bf16").embedded == IMAGES

    layout = Layout(output)
    (layout.embeddings / layout.part_name(1)).unlink()
    with pytest.raises(ResfeatError, match="under --min-parity 1"):
        run(source, output, precision="bf16", min_parity=1)
    assert layout.committed() == [0, 2]
    assert run(source, output, precision="bf16").images == 4  # of the part that was gone


def test_parity_is_that_of_the_choices_that_were_taken_over_with(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Run, "tasks", no_worker)  # cut off when parity is measured
        with pytest.raises(ResfeatError, match="could not start"):
            run(source, output, precision="bf16")
    before = open_dataset(output).record.parity
    parity = vars(run(source, output, precision="bf16", model="cifar_resnet32").parity)
    assert open_dataset(output).record.parity == parity != before


def test_a_run_that_was_overtaken_ends_and_touches_nothing(source, tmp_path, monkeypatch):
    locks = []

    @contextmanager
    def noted(*arguments, **options):
        with run_lock(*arguments, **options) as lock:
            locks.append(lock)
            yield lock

    def overtaken(progress):
        if progress.total:  # it embeds
            locks[0].taken.set()

    monkeypatch.setattr("resfeat.dataset.holding.run_lock", noted)
    output = tmp_path / "out"
    with pytest.raises(ResfeatError, match="another run took"):
        extract(spec(source, output), on_progress=overtaken)
    assert Layout(output).spec.exists() and not list(Layout(output).runs.iterdir())


def tasks(output, todo, killed=None):
    """The numbers of the shards that a run takes care with."""
    layout = Layout(output)
    record = Record.load(layout)
    shards = [record.plan.shards[number] for number in todo]
    request = SimpleNamespace(
        layout=layout,
        spec=SimpleNamespace(retry_failed=False),
        watch=Watch(),
        started=0.0,
        shards=lambda record: shards,
        todo=lambda record: shards,
    )
    weights = SimpleNamespace(notes=())
    made = Run(request, Lock(str(output), killed), weights, record, False).tasks(Future())
    assert [task.shard.number for task in made] == todo
    return [task.shard.number for task in made if task.careful]


def test_what_a_run_takes_care_with(finished, source, tmp_path):
    output = tmp_path / "out"
    run(source, output)
    layout, killed = Layout(output), Writer.me()
    assert tasks(output, [0, 1, 2]) == []
    # Killed while it did failures again: nobody knows which of them it had come to.
    assert tasks(output, [0, 1, 2], killed) == [0, 1, 2]
    (layout.embeddings / layout.part_name(0)).unlink()
    (layout.embeddings / layout.part_name(1)).unlink()
    (layout.embeddings / layout.part_name(2)).unlink()
    # Killed in its first pass: it had two shards in hand.
    assert tasks(output, [0, 1, 2], killed) == [0, 1]
    assert tasks(output, [0, 1, 2]) == []


def test_a_shard_that_is_known_to_hold_a_killer_is_done_with_care(source, tmp_path):
    output = tmp_path / "out"
    run(source, output)
    layout = Layout(output)
    for shard, reason in ((0, "decoder_crash"), (1, "timeout"), (2, "truncated")):
        replace(Note.read(layout, shard), reasons={reason: 1}).write(layout, shard)
    assert tasks(output, [0, 1, 2]) == [0, 1]


def test_nobody_opens_a_part_to_count_it(source, tmp_path):
    """Ten million images have thousands of parts; their notes say what is in them."""
    output = tmp_path / "out"
    run(source, output)
    for part in Layout(output).embeddings.iterdir():
        os.truncate(part, 0)
    assert open_dataset(output).commits().embedded == IMAGES
    report = run(source, output)
    assert (report.status, report.embedded, report.images) == ("finished", IMAGES, 0)


def test_a_file_with_another_time_than_it_was_listed_with_counts_as_changed(source, tmp_path):
    pictures = shutil.copytree(source, tmp_path / "in")

    def touch(step):
        if step == "starting the workers":
            os.utime(pictures / "a" / "00.png", (0, 0))

    report = extract(spec(pictures, tmp_path / "out"), on_step=touch)
    assert (report.embedded, report.changed) == (IMAGES, 1)


def test_every_step_is_told_before_it_is_done(source, tmp_path):
    told = []
    compared = RuntimeOptions(workers=0, runtime="openvino")
    extract(spec(source, tmp_path / "out", runtime=compared), on_step=told.append)
    assert [text.split()[0] for text in told] == [
        "looking", "loading", "listing", "starting", "comparing",
    ]  # fmt: skip
    assert str(source) in told[0] and "cifar_resnet20" in told[1]


def test_a_run_that_is_stopped_before_a_shard_is_done_says_what_helps(source, tmp_path):
    """A scheduler that starts it again for as long would do so for ever."""
    told, steps = [], []
    watched = {"on_note": told.append, "on_step": steps.append}
    begun = extract(
        spec(source, tmp_path), stopping=lambda: "starting the workers" in steps, **watched
    )
    assert (begun.status, begun.shards, begun.shards_left) == ("interrupted", 0, 3)
    (line,) = told
    assert line.startswith("no shard was done in this run: give it more time, or a new output")
    assert begun.notes == told

    shown = []
    on_its_way = extract(
        spec(source, tmp_path), stopping=lambda: bool(shown and shown[-1].done), **watched,
        on_progress=shown.append,
    )  # fmt: skip
    assert on_its_way.status == "interrupted" and on_its_way.shards
    assert told == [line]


def test_a_dataset_of_an_earlier_format_is_refused_with_what_to_do(source, finished, tmp_path):
    output = tmp_path / "out"
    run(source, output)
    place = Layout(output).spec
    content = json.loads(place.read_text())
    place.write_text(json.dumps({**content, "format": 3, "versions": {"resfeat": "0.1.0"}}))
    before = sorted(output.rglob("*"))
    for use in (lambda: run(source, output), lambda: open_dataset(output)):
        with pytest.raises(ResfeatError, match=r"format 3, of resfeat 0\.1\.0.* new -o"):
            use()
    assert sorted(output.rglob("*")) == before
