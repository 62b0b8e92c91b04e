"""Datasets in object stores that follow a collection there, or that several runs share.

As in test_object_store.py: moto's S3, a proxy that loses and breaks what passes, real processes.
"""

import io
import json
import multiprocessing
import signal
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from typing import get_args

import azure
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import call, error_of
from forked import start
from gcs import GoogleStore
from integration.test_partitions import OPTIONS, behind_a_gate, commits, ended, named, until
from later import Later
from object_store import FaultyProxy, ObjectStore, RandomFaults
from PIL import Image
from seams import KILL_AT_STEP, after_import
from tables import rows

from resfeat import open_dataset
from resfeat.dataset import commit, generation
from resfeat.storage import Fence, locate, remote, remove, write_whole

moto = Later("moto.s3.models")

IMAGES, SHARD, SHARDS = 22, 5, 5
ADDED, CHANGED, REMOVED = 2, 3, 1
THEN = datetime(2026, 1, 1, 12)
FAILED = "folder/3.bmp"  # an image from the update on


def picture(seed: int) -> bytes:
    """All are of the same length."""
    pixels = np.random.default_rng(seed).integers(0, 255, (34, 36, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "BMP")
    return content.getvalue()


def collection(is_changed: bool) -> dict[str, bytes]:
    """What a source holds, before and after: contents by name."""
    found = {f"folder/{n}.bmp": picture(n) for n in range(IMAGES)}
    found[FAILED] = b"not an image"
    if is_changed:
        del found["folder/7.bmp"]
        found[FAILED] = picture(300)
        found["folder/8.bmp"] = picture(800)
        found["folder/12.bmp"] = picture(1200)
        found |= {"a new one.bmp": picture(1), "folder/5 and a half.bmp": picture(5000)}
    return found


@pytest.fixture(scope="module")
def store():
    with ObjectStore() as store:
        yield store


@pytest.fixture
def proxy(store):
    with FaultyProxy(store.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def objects(store):
    return store.resource()


@pytest.fixture(scope="module")
def resfeat():
    """Run the command in a process that stays, see test_object_store.py."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *arguments, env=None: pool.submit(call, *map(str, arguments), env=env).result(
            timeout=300
        )


SOURCE = "s3://followed/tree"


def fill(objects, is_changed):
    """Have the source hold what it does before, or after. Of a later moment than the last nothing
    tells, as if all that changed had done so within a second."""
    bucket, wanted = objects.Bucket("followed"), collection(is_changed)
    for each in bucket.objects.all():
        if each.key.removeprefix("tree/") not in wanted:
            each.delete()
    for name, content in wanted.items():
        bucket.put_object(Key=f"tree/{name}", Body=content)
    for key in moto.s3_backends["123456789012"]["aws"].buckets["followed"].keys.values():
        key.last_modified = THEN


@pytest.fixture(scope="module")
def begun(objects, store, resfeat):
    """The source before, extracted into a bucket. Not to be changed."""
    objects.Bucket("followed").create()
    fill(objects, False)
    output = bucket_of(objects) + "/out"
    done = resfeat("extract", SOURCE, "-o", output, *OPTIONS, env=store.environment)
    assert done.returncode == 0, done.stderr
    bucket = objects.Bucket(output.split("/")[2])
    assert len(parts(bucket)) == SHARDS
    return bucket


@pytest.fixture
def bucket(begun, objects):
    """A copy of it, of one's own."""
    bucket = objects.Bucket(bucket_of(objects).removeprefix("s3://"))
    for each in begun.objects.filter(Prefix="out/"):
        bucket.Object(each.key).copy_from(CopySource={"Bucket": begun.name, "Key": each.key})
    return bucket


@pytest.fixture
def changed(begun, objects):
    """The source after."""
    fill(objects, True)
    yield SOURCE
    fill(objects, False)


@pytest.fixture(scope="module")
def fresh(begun, objects, store, resfeat, tmp_path_factory):
    """The source after, extracted anew, to a disk."""
    output = tmp_path_factory.mktemp("fresh") / "out"
    fill(objects, True)
    done = resfeat("extract", SOURCE, "-o", output, *OPTIONS, env=store.environment)
    assert done.returncode == 0, done.stderr
    fill(objects, False)
    return output


def bucket_of(objects) -> str:
    bucket = objects.Bucket(f"bucket-{uuid.uuid4().hex}")
    bucket.create()
    return f"s3://{bucket.name}"


def table(bucket, kind="embeddings") -> pa.Table:
    """All rows below `out/`, by id, with the bits of every column."""
    found = [
        pq.read_table(io.BytesIO(each.get()["Body"].read()))
        for each in bucket.objects.filter(Prefix=f"out/{kind}/")
        if each.key.endswith(".parquet")
    ]
    return pa.concat_tables(found).sort_by("id") if found else None


def parts(bucket) -> dict[str, str]:
    """The versions of the parts, by key."""
    found = bucket.objects.filter(Prefix="out/embeddings/part-")
    return {each.key: (each.e_tag, each.last_modified) for each in found}


def is_fresh(bucket, fresh) -> bool:
    """Whether a dataset is the fresh one; that has no failures."""
    assert not (fresh / "failures").exists()
    now = table(bucket)
    same = now.select(rows(fresh).column_names).equals(rows(fresh))
    return same and table(bucket, "failures") is None


def read(proxy) -> set[str]:
    """The images that were asked for, as the proxy saw it."""
    paths = {path for method, path, _ in proxy.requests if method == "GET"}
    # `datasets` would have saved a dataset there, if there were its two .json.
    return {path for path in paths if path.startswith("/followed/tree/") and path.endswith(".bmp")}


def written(proxy) -> Counter:
    """The keys that were written, without the bucket."""
    return Counter(path.split("/", 2)[2] for method, path, _ in proxy.requests
                   if method in ("PUT", "POST", "DELETE"))  # fmt: skip


def test_a_bad_network_changes_nothing_of_an_update(bucket, changed, fresh, proxy, resfeat):
    output, env = f"s3://{bucket.name}/out", proxy.environment
    kinds = ("500", "503", "reset", "cut", "lost")
    chance, losses = RandomFaults(0.2, kinds, seed=3, most=4), iter(["lost"])

    def rule(method, path):
        """The answer to the first write of a part is lost, and all else by chance."""
        is_part = method == "PUT" and "/embeddings/part-" in path
        return (next(losses, None) if is_part else None) or chance(method, path)

    proxy.faults = rule
    before = parts(bucket)
    done = resfeat("extract", changed, "-o", output, *OPTIONS, "--update", env=env)
    assert done.returncode == 0, done.stderr
    kept = IMAGES - CHANGED - REMOVED
    counts = f"{ADDED} added, {CHANGED} changed, {REMOVED} removed, {kept} kept, 0 failed"
    assert f"Update: {counts}" in done.stdout
    assert {fault for *_, fault in proxy.requests if fault} == set(kinds)
    assert next(losses, None) is None
    # The one that has another etag and nothing else was noticed, and no other one read.
    assert len(read(proxy)) == ADDED + CHANGED
    assert "/followed/tree/folder/8.bmp" in read(proxy)
    assert is_fresh(bucket, fresh)
    untouched = set(before.items()) & set(parts(bucket).items())
    assert untouched and len(parts(bucket)) == SHARDS + 1
    verified = resfeat("verify", output, env=env)
    assert verified.returncode == 0 and "Nothing is wrong" in verified.stdout


def test_what_changed_is_told_by_its_etag_alone(begun, changed, objects):
    """What the test above relies on: size and time are those of before."""
    plan = begun.Object("out/_resfeat/plan/plan-00000.parquet").get()["Body"].read()
    listed = {each["id"]: each for each in pq.read_table(io.BytesIO(plan)).to_pylist()}
    for name in ("folder/8.bmp", "folder/12.bmp"):
        before, now = listed[name], objects.Object("followed", f"tree/{name}")
        assert now.content_length == before["size"]
        assert now.last_modified == before["mtime"]
        assert now.e_tag.strip('"') != before["etag"].strip('"')


def test_an_update_that_finds_nothing_writes_the_lock_the_record_and_the_report(
    bucket, proxy, resfeat
):
    output, before = f"s3://{bucket.name}/out", table(bucket)
    done = resfeat("extract", SOURCE, "-o", output, *OPTIONS, "--update", "--log-json",
                   env=proxy.environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["update"] == {"added": 0, "changed": 0, "removed": 0, "kept": IMAGES}
    count = written(proxy)
    assert count.pop("out/_resfeat/locks/all") >= 2  # taken, renewed every 10 s, and given up
    assert count == {"out/_resfeat/spec.json": 1, f"out/_resfeat/runs/{report['run_id']}.json": 1}
    assert not read(proxy)
    assert table(bucket).equals(before)


EVERY_STEP = [*((generation, step) for step in generation.STEPS),
              *((commit, step) for step in get_args(commit.Step))]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "step"),
    [
        pytest.param(module, step, marks=() if step == "current" else pytest.mark.more)
        for module, step in EVERY_STEP
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_update_that_is_killed_is_gone_on_with(
    module, step, bucket, changed, fresh, store, resfeat, tmp_path
):
    before = table(bucket)
    command = ["extract", changed, "-o", f"s3://{bucket.name}/out", *OPTIONS, "--update"]
    hook = after_import({module.__name__: KILL_AT_STEP}, tmp_path / "hook")
    run = start(*command, env={**hook, **store.environment, "KILL_AT": step})
    _, complained = run.communicate(timeout=120)
    assert run.returncode == -signal.SIGKILL, complained
    there = table(bucket)["id"].to_pylist()
    stays = set(rows(fresh)["id"].to_pylist()) & set(before["id"].to_pylist())
    assert len(there) == len(set(there)) and stays <= set(there)
    done = resfeat(*command, env=store.environment)
    assert done.returncode == 0, done.stderr
    assert is_fresh(bucket, fresh)
    verified = resfeat("verify", f"s3://{bucket.name}/out", env=store.environment)
    assert verified.returncode == 0 and "Nothing is wrong" in verified.stdout
    plan = [each.key for each in bucket.objects.filter(Prefix="out/_resfeat/plan/plan-")]
    spec = json.loads(bucket.Object("out/_resfeat/spec.json").get()["Body"].read())
    named = {f"out/_resfeat/plan/{file['name']}" for file in spec["plan"]["files"]}
    assert named <= set(plan)


@pytest.fixture
def google():
    with GoogleStore() as store:
        store.make("pictures")
        yield "gs://pictures", store.environment


@pytest.fixture
def microsoft():
    if not azure.azurite():
        pytest.skip("azurite is not installed")
    with azure.AzureStore() as store:
        store.make("pictures")
        yield "az://pictures", store.environment


@pytest.mark.parametrize("cloud", ["google", pytest.param("microsoft", marks=pytest.mark.more)])
def test_an_update_of_a_dataset_in_the_other_clouds(cloud, request, resfeat, tmp_path, monkeypatch):
    root, env = request.getfixturevalue(cloud)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    remote.store.cache_clear()
    source, output = locate(f"{root}/tree"), f"{root}/out"
    command = ["extract", source, "-o", output, *OPTIONS]
    fill_with(source, {}, collection(False))
    done = resfeat(*command, env=env)
    assert done.returncode == 0, done.stderr
    fill_with(source, collection(False), collection(True))
    done = resfeat(*command, "--update", env=env)
    assert done.returncode == 0, done.stderr
    assert f"Update: {ADDED} added, {CHANGED} changed, {REMOVED} removed" in done.stdout
    anew = resfeat("extract", source, "-o", tmp_path / "fresh", *OPTIONS, env=env)
    assert anew.returncode == 0, anew.stderr
    dataset = open_dataset(output)
    assert dataset.embeddings.to_table().sort_by("id").equals(rows(tmp_path / "fresh"))
    assert dataset.failures.to_table().num_rows == 0
    verified = resfeat("verify", output, env=env)
    assert verified.returncode == 0 and "Nothing is wrong" in verified.stdout


def fill_with(source, before, after):
    """Have a folder hold what it does after."""
    for name in before.keys() - after.keys():
        remove(source / name)
    for name, content in after.items():
        if before.get(name) != content:
            write_whole(Fence(), source / name, content)


@pytest.mark.more
def test_three_partitions_one_of_which_is_killed(begun, objects, store, resfeat, tmp_path):
    gate, env = behind_a_gate(tmp_path)
    output = bucket_of(objects) + "/out"
    bucket = objects.Bucket(output.split("/")[2])
    command = ["extract", SOURCE, "-o", output, *OPTIONS]
    env = {**env, **store.environment, "SLOW": "1"}
    numbers = (1, 2, 3)
    runs = [start(*command, "--partition", f"{n}/3", env={**env, "FREE": "1"}) for n in numbers]
    with ended(runs):
        until(lambda: {run.pid for run in runs} <= set(commits(env)))
        assert runs[2].wait(60) == 0  # it had one shard
        before = sorted(each.key for each in bucket.objects.all())
        for share, who in (("2/3", "2/3"), ("1/2", ""), ("", "")):
            which = ["--partition", share] if share else []
            done = resfeat(*command, *which, env=store.environment)
            assert done.returncode == 1, done.stderr
            assert (named(runs[1], who) if who else "is being written by partition ") in error_of(
                done.stderr
            )
        assert sorted(each.key for each in bucket.objects.all()) == before
        runs[0].kill()
        assert runs[0].wait(60) == -signal.SIGKILL
        told = json.loads(resfeat("status", output, "--json", env=store.environment).stdout)
        shares = {each["partition"]: each for each in told["partitions"]}
        assert [each["shards_left"] for each in shares.values()] == [1, 1, 0]
        assert shares["1/3"]["writer"] is None
        assert f"process {runs[1].pid} on " in shares["2/3"]["writer"]
        gate.unlink()
        done = resfeat(*command, "--partition", "1/3", env=store.environment)
        assert done.returncode == 0, done.stderr
        assert f"the last run (partition 1/3, process {runs[0].pid} on " in done.stderr
        told = [run.communicate(timeout=120) for run in runs[1:]]
    assert [run.returncode for run in runs[1:]] == [0, 0], told
    assert Counter(commits(env)) == {runs[0].pid: 1, runs[1].pid: 2, runs[2].pid: 1}
    assert len(parts(bucket)) == SHARDS
    assert table(bucket).equals(table(begun))
