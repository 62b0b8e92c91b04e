"""One shard, from the plan to the commit, with a network that takes milliseconds."""

import io
import json
import threading
import time
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tables import listed

from resfeat import ExtractSpec, RuntimeOptions, extract, open_dataset, sources
from resfeat.backbones.weights import resolve
from resfeat.dataset import FailedItem
from resfeat.dataset.reader import Kept
from resfeat.engines import inline
from resfeat.errors import Failure, Stopped
from resfeat.sources import Item, reading
from resfeat.spec import FeatureSpec
from resfeat.worker import Job, Placement, batches, shard, worker
from resfeat.worker.worker import Worker, forward, network_for


class Shrinking:
    """A device whose memory another thread fills up: that one has found what fits by then."""

    def __init__(self, worker):
        self.worker, self.sizes = worker, []

    def embed(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > 2:
            self.worker.fits = 2
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return np.zeros((len(pixels), 4), np.float32)


def test_a_thread_that_fails_beside_another_does_not_take_more_than_that_one_found():
    worker = Worker.__new__(Worker)  # without its threads and its own model
    worker.fits = 16
    worker.runtime = Shrinking(worker)
    assert forward(worker, np.zeros((16, 8, 8, 3), np.uint8)).shape == (16, 4)
    assert worker.runtime.sizes == [16, *[2] * 8] and worker.fits == 2


def test_what_was_made_of_an_item_as_it_is_now_stays():
    failed = FailedItem("b.jpg", "", Failure("read", "empty", ""))
    kept = Kept({"a.jpg": 0}, {"b.jpg": failed}, generation=1)
    for retry in (False, True):
        for since, stays in ((0, True), (1, True), (2, False)):
            item = Item("a.jpg", "file:///a.jpg", 11, 21, since=since)
            assert kept.of(item, retry=retry) == (0 if stays else None)
            expected = failed if stays and not retry else None
            assert kept.of(item._replace(id="b.jpg"), retry=retry) == expected
        assert kept.of(Item("c.jpg", "file:///a.jpg", 10, 20), retry=retry) is None


def test_progress_counts_failures_too(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    told, workers = [], []
    do, commit = inline.process_shard, shard.Part.commit

    def noted(worker, task):
        workers.append(worker)
        return do(worker, task)

    def and_look(part, ids):
        told.extend(workers[0].progress.values())
        commit(part, ids)

    monkeypatch.setattr(inline, "process_shard", noted)
    monkeypatch.setattr(shard.Part, "commit", and_look)
    spec = ExtractSpec(
        sources=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        runtime=RuntimeOptions(workers=0, runtime="torch", batch_size=2),
    )
    assert extract(spec).failed == 1
    assert told == [(4, 1)]


def test_a_shard_that_waits_for_its_turn_is_dropped_at_once(tmp_path, monkeypatch):
    """And leaves nothing: the one before it, which has the turn, decodes nothing until then."""
    (tmp_path / "in").mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "in" / f"{number}.png")
    do, decode, dropped = inline.process_shard, Worker.decode, threading.Event()

    def drop_the_second(worker, task):
        if task.shard.number == 1:
            worker.dropped.add(task.shard)
        try:
            return do(worker, task)
        except Stopped:
            dropped.set()
            raise

    def wait_for_that(*what):
        assert dropped.wait(50)
        return decode(*what)

    monkeypatch.setattr(inline, "process_shard", drop_the_second)
    monkeypatch.setattr(Worker, "decode", wait_for_that)
    monkeypatch.setattr(batches, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(batches, "IMAGES_AHEAD", 1)
    spec = ExtractSpec(
        sources=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        shard_size=4,
        runtime=RuntimeOptions(workers=0, runtime="torch", batch_size=1, cpus_per_worker=1),
    )
    assert extract(spec).status == "interrupted" and dropped.is_set()
    dataset = open_dataset(tmp_path / "out")
    assert 1 not in dataset.layout.committed() and not list(dataset.layout.tmp.iterdir())


class Container:
    """A file of several images one behind the other, as a source: a tar without its headers."""

    carried = (pa.field("price", pa.int8()), pa.field("tags", pa.list_(pa.string())))

    def __init__(self, path, contents):
        self.roots, self.skipped = [str(path)], {}
        self._items, offset = [], 0
        path.write_bytes(b"".join(contents))
        mtime = path.stat().st_mtime_ns // 1000
        for number, content in enumerate(contents):
            about = {"label": f"kind {number % 2}", "carried": (number, [f"tag {number}"])}
            self._items.append(
                Item(f"{number}.png", path.as_uri(), len(content), mtime, offset=offset, **about)
            )
            offset += len(content)

    def open(self):
        """There is nothing to find out."""

    def tables(self):
        return listed(self._items, self.carried)


@pytest.mark.parametrize("workers", [0])
def test_an_image_in_a_container_is_embedded_like_a_file_and_keeps_its_columns(
    workers, tmp_path, monkeypatch
):
    contents = []
    (tmp_path / "loose").mkdir()
    for number in range(6):
        picture, content = Image.effect_noise((40, 40), 20 + number).convert("RGB"), io.BytesIO()
        picture.save(content, "PNG")
        contents.append(content.getvalue() if number != 4 else b"no image at all")
        (tmp_path / "loose" / f"{number}.png").write_bytes(contents[-1])

    def run(source):
        spec = ExtractSpec(
            sources=(str(source),),
            output=str(tmp_path / f"of {source.name}"),
            model="cifar_resnet20",
            weights="random:0",
            label_from="parent",
            shard_size=4,
            max_error_rate=1,
            runtime=RuntimeOptions(workers=workers),
        )
        assert extract(spec).failed == 1
        dataset = open_dataset(spec.output)
        tables = [dataset.embeddings.to_table(), dataset.failures.to_table()]
        return [table.sort_by("id").to_pylist() for table in tables]

    loose, _ = run(tmp_path / "loose")
    container = Container(tmp_path / "container", contents)
    monkeypatch.setattr(sources, "listing", lambda *_: container)
    packed, failed = run(tmp_path / "container")
    assert [row["embedding"] for row in packed] == [row["embedding"] for row in loose]
    for row in packed:
        number = int(row["id"][0])
        expected = {"price": number, "tags": [f"tag {number}"], "label": f"kind {number % 2}"}
        assert expected.items() <= row.items()
        assert row["size"] == len(contents[number])
    ((failure),) = failed
    assert (failure["id"], failure["price"], failure["tags"]) == ("4.png", 4, ["tag 4"])
    # A run that goes on finds the columns in the plan.
    monkeypatch.undo()
    for part in (tmp_path / "of container" / "embeddings").iterdir():
        part.unlink()
    monkeypatch.setattr(sources, "listing", lambda *_: SimpleNamespace(**vars(container)))
    again, _ = run(tmp_path / "container")
    assert again == packed
    assert json.loads((tmp_path / "of container" / "_resfeat" / "spec.json").read_text())


@pytest.mark.parametrize("early", [batches.EARLY_IMAGES, 40])
def test_an_image_that_takes_long_holds_nobody_up(early, tmp_path, monkeypatch):
    """The first of many is decoded until all others but those of its run are embedded, or as many
    as may be kept in memory meanwhile."""
    monkeypatch.setattr(batches, "EARLY_IMAGES", early)
    (tmp_path / "in").mkdir()
    names = [f"{number:03}.png" for number in range(400)]
    for number, name in enumerate(names):
        Image.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(tmp_path / "in" / name)
    first = (tmp_path / "in" / names[0]).read_bytes()
    embedded, others = [], threading.Event()
    decode, embed = Worker.decode, batches.forward

    def slowly(worker, data, *options):
        if data == first:
            assert others.wait(20) if early > len(names) else not others.wait(2)
            assert len(embedded) > early or early > len(names)
        return decode(worker, data, *options)

    def noted(worker, pixels):
        embedded.extend(int(low) + 256 * int(high) for low, high, _ in pixels[:, 0, 0])
        if set(range(batches.RUN_IMAGES, len(names))) <= set(embedded):
            others.set()
        return embed(worker, pixels)

    monkeypatch.setattr(Worker, "decode", slowly)
    monkeypatch.setattr(batches, "forward", noted)
    spec = ExtractSpec(
        sources=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        shard_size=len(names),
        runtime=RuntimeOptions(workers=0, runtime="torch", batch_size=8),
    )
    assert extract(spec).embedded == len(names)
    # In the order of the plan all the same.
    assert open_dataset(spec.output).embeddings.to_table(["id"])["id"].to_pylist() == names


@pytest.mark.parametrize("slow", [False, True])
def test_more_threads_than_cores_load_images_only_where_readingis_slow(slow, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(400):
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(tmp_path / "in" / f"{number:03}.png")
    under_way, most, lock, read = 0, 0, threading.Lock(), reading.read

    def counted(item):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.004)
        with lock:
            under_way -= 1
        return read(item)

    monkeypatch.setattr(reading, "read", counted)
    monkeypatch.setattr(worker, "SLOW_SECONDS", 0.002 if slow else 60)
    spec = ExtractSpec(
        sources=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model="cifar_resnet20",
        weights="random:0",
        shard_size=400,
        runtime=RuntimeOptions(workers=0, runtime="torch", batch_size=2, cpus_per_worker=2),
    )
    assert extract(spec).embedded == 400
    assert most > 2 if slow else most == 2


def idle_worker(cpus):
    """One without a dataset, that may read with four threads more than it has cores."""
    weights = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0"))
    job = Job(output="", share="", sources=(), reads_ahead=4, identity=weights.identity,
              dims=weights.dims, with_label=False)  # fmt: skip
    placement = Placement(runtime="torch", device="cpu", cpus=cpus, batch_size=4)
    return closing(Worker(job, placement, network_for(job, placement, weights.tensors)))


def test_threads_beyond_the_cores_go_once_reading_is_fast_again():
    loading, at_once, all_done = set(), [], threading.Event()

    def load(number, seconds):
        loader.adapt_readers(seconds)
        loading.add(number)
        at_once.append(len(loading))
        time.sleep(0.03)
        loading.remove(number)
        if number == 99:
            all_done.set()

    with idle_worker(cpus=2) as loader:
        for number in range(100):
            loader.load(partial(load, number, 0.01 if number < 50 else 0.0001))
            time.sleep(0.001)  # a thread more begins with what comes next
        assert all_done.wait(60)
    assert max(at_once[:50]) == 6
    assert max(at_once[70:]) == 2


def test_what_is_to_be_loaded_is_begun_in_its_order():
    """With more threads than may load at a time: none waits with a run in hand, which others would
    overtake time and again, so that the end of a shard waits for the next."""
    begun, all_begun = [], threading.Event()

    def load(number):
        begun.append(number)
        time.sleep(0.001)
        if number == 49:
            all_begun.set()

    with idle_worker(cpus=1) as loader:
        for number in range(50):
            loader.load(partial(load, number))
        assert all_begun.wait(60)
    assert begun == list(range(50))


def test_a_run_is_of_so_many_images_and_bytes():
    def lengths(place, *sizes):
        items = [Item(str(n), f"{place}/{n}.jpg", size, 0) for n, size in enumerate(sizes)]
        runs = [run.places for run in sources.runs(items, range(len(items)), 100)]
        assert [place for run in runs for place in run] == list(range(len(items)))
        return [len(run) for run in runs]

    megabyte = 1024**2
    assert lengths("file:///a", *[1000] * 70) == [32, 32, 6]
    assert lengths("file:///a", *[3 * megabyte] * 5) == [2, 2, 1]
    assert lengths("file:///a", 1, 20 * megabyte, 1, 1) == [1, 1, 2]
    assert lengths("s3://bucket", 1, 1, 1) == [1, 1, 1]
