"""From and to an object store, by real processes, through a network that is made bad.

The store is moto's, on loopback; between it and the command there is a proxy, which loses, delays
and breaks what passes. Rows are looked at by another client.
"""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from urllib.request import Request, urlopen

import azure
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import call, error_of
from forked import start
from gcs import GoogleStore
from object_store import FaultyProxy, ObjectStore, RandomFaults
from photos import write_photos
from seams import after_import
from tables import rows

from resfeat import open_dataset
from resfeat.dataset import Layout
from resfeat.dataset.writer import Writer
from resfeat.fidelity.parity import SAMPLE
from resfeat.storage import Fence, locate, remote, write_whole

PHOTOS = 36
SHARD = 10
SHARDS = 4  # of 40 images
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"

# Names that are something else in a URL, a shell or a query.
ODD = {
    "chelsea/00001.jpg": "odd folder +%41/-rf.jpg",
    "coffee/00012.png": "odd folder +%41/#1.png",
    "flower/00022.webp": "odd folder +%41/what?&b=c.webp",
    "retina/00007.jpg": "\u65e5\u672c/e\u0301 \u00e9.jpg",
}
CHINA = ("02.jpg", "11.png", "20.webp", "29.jpg")  # four of its photographs
BAD = {"empty.jpg": b"", "page.jpg": b"<!doctype html>", "noise.png": bytes(range(256))}
REASONS = {"empty": 1, "unidentified": 2}
OTHERS = {".DS_Store": b"x", "china/notes.txt": b"x", ".trash/1.jpg": b"x"}
COLUMNS = ["id", "embedding", "width", "height", "size", "label"]


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
    """Another client's view of the store."""
    return store.resource()


@pytest.fixture
def bucket(objects):
    """A new bucket."""
    bucket = objects.Bucket(f"bucket-{uuid.uuid4().hex}")
    bucket.create()
    return bucket


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Photographs, some under odd names, with what is no image among them. Not to be changed."""
    folder = tmp_path_factory.mktemp("tree") / "tree"
    write_photos(folder, PHOTOS, long_side=240)
    photo = folder / "chelsea" / "00001.jpg"
    for name, content in {**BAD, **OTHERS, "twin.jpg": photo.read_bytes()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for name, odd in ODD.items():
        (folder / odd).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / odd)
    return folder


@pytest.fixture(scope="module")
def source(tree, objects):
    """The same in a bucket, with markers of folders. Not to be changed."""
    bucket = objects.Bucket("pictures")
    bucket.create()
    upload(tree, bucket)
    for marker in ("tree/", "tree/china/", "tree/nothing/"):
        bucket.put_object(Key=marker, Body=b"")
    return "s3://pictures/tree"


def upload(tree, bucket):
    for path in tree.rglob("*"):
        if path.is_file():
            bucket.put_object(Key=f"tree/{path.relative_to(tree)}", Body=path.read_bytes())


@pytest.fixture(scope="module")
def options(choices):
    return [*choices, "--runtime", "torch", "--shard-size", SHARD, "--batch-size", 8,
            "--workers", 0, "--max-error-rate", 0.5]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tree, options, resfeat, tmp_path_factory):
    """The tree, extracted from disk to disk."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = resfeat("extract", tree, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    assert len(Layout(output).committed()) == SHARDS
    return output


@pytest.fixture(scope="module")
def finished(source, objects, store, options, resfeat):
    """The same from store to store: its bucket, what was sent and what was told. Not to be
    changed."""
    bucket = objects.Bucket("finished")
    bucket.create()
    with FaultyProxy(store.endpoint) as proxy:
        env = {**proxy.environment, "AWS_SECRET_ACCESS_KEY": SECRET}
        output = "s3://finished/out"
        done = resfeat("extract", source, "-o", output, *options, "--verbose", env=env)
    assert done.returncode == 0, done.stderr
    return bucket, proxy.requests, done


@pytest.fixture(scope="module")
def resfeat():
    """Run the command in a process that stays: the store and the proxy are threads of this one,
    and what waits for their answer in it would keep them from giving it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *arguments, env=None: pool.submit(call, *map(str, arguments), env=env).result(
            timeout=300
        )


@pytest.fixture
def hasty(tmp_path):
    """The environment of a process that waits for the store less long, or less often."""

    def environment(proxy, patch):
        hook = after_import({"resfeat.storage.remote": patch}, tmp_path / "hook")
        return {**hook, **proxy.environment}

    return environment


def table(bucket, kind="embeddings"):
    """All rows below `out/`, by id."""
    parts = [
        pq.read_table(io.BytesIO(each.get()["Body"].read()))
        for each in bucket.objects.filter(Prefix=f"out/{kind}/")
        if each.key.endswith(".parquet")
    ]
    return pa.concat_tables(parts).sort_by("id")


def whole(bucket, undisturbed):
    """Whether the dataset is the undisturbed one, every image one row."""
    same = table(bucket).select(COLUMNS).equals(rows(undisturbed).select(COLUMNS))
    failures = ["id", "stage", "reason"]
    theirs = rows(undisturbed, "failures").select(failures)
    return same and table(bucket, "failures").select(failures).equals(theirs)


def parts(bucket):
    return [each.key for each in bucket.objects.filter(Prefix="out/embeddings/part-")]


def of_content(bucket):
    """Keys of all objects but the markers of folders."""
    return [each.key for each in bucket.objects.all() if not each.key.endswith("/")]


def faults(proxy):
    return Counter(fault for *_, fault in proxy.requests if fault)


def after(part, act):
    """A rule: right before the first write behind those whose names have this part, act."""
    state = []

    def rule(method, path):
        if method == "PUT" and part in path:
            state.append(path)
        elif state and method == "PUT" and "/lock" not in path:
            state.clear()
            act()

    return rule


def after_parts(count, act):
    """A rule: once so many parts were written, act, and no fault."""
    written = set()

    def rule(method, path):
        if len(written) >= count:
            written.clear()
            act()
        if method == "PUT" and "/embeddings/part-" in path:
            written.add(path)

    return rule


def one_line(complained, code, expected):
    """The line of an error, when it is one and the code is as expected."""
    assert code == expected and "Traceback" not in complained, complained
    # What comes before are notes and the progress.
    *before, line = complained.strip().splitlines()
    assert line.startswith("Error: ") and not any("rror" in other for other in before)
    return line


def test_from_store_to_store_is_the_same_as_from_disk_to_disk(finished, undisturbed, source):
    bucket, _, done = finished
    assert "37 embedded and 3 failed of 40 images in s3://finished/out" in done.stdout
    assert "Passed over, not images: " in done.stdout
    assert whole(bucket, undisturbed)

    # The order of the plan, too.
    def planned(content):
        return pq.read_table(content)["id"].to_pylist()

    plan = bucket.Object("out/_resfeat/plan/plan-00000.parquet").get()["Body"].read()
    assert planned(io.BytesIO(plan)) == planned(Layout(undisturbed).plan / "plan-00000.parquet")
    uris = {row["id"]: row["uri"] for row in table(bucket, "failures").to_pylist()}
    assert uris == {name: f"{source}/{name}" for name in BAD}


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


@pytest.mark.parametrize("cloud", ["google", "microsoft"])
def test_from_and_to_the_other_clouds_it_is_the_same(
    cloud, request, tree, options, undisturbed, resfeat, tmp_path, monkeypatch
):
    root, env = request.getfixturevalue(cloud)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    remote.store.cache_clear()
    for path in tree.rglob("*"):
        if path.is_file():
            place = locate(f"{root}/tree") / str(path.relative_to(tree))
            write_whole(Fence(), place, path.read_bytes())
    done = resfeat("extract", f"{root}/tree", "-o", f"{root}/out", *options, env=env)
    assert done.returncode == 0, done.stderr
    verified = resfeat("verify", f"{root}/out", env=env)
    assert verified.returncode == 0 and "Nothing is wrong" in verified.stdout
    dataset = open_dataset(f"{root}/out")
    there = dataset.embeddings.to_table().sort_by("id").select(COLUMNS)
    assert there.equals(rows(undisturbed).select(COLUMNS))
    assert Counter(dataset.failures.to_table()["reason"].to_pylist()) == REASONS
    again = resfeat("extract", f"{root}/tree", "-o", f"{root}/out", *options, env=env)
    assert again.returncode == 0, again.stderr


def test_nothing_else_is_written_or_read(finished, objects):
    bucket, requests, _ = finished
    layout = Layout("s3://finished/out")
    allowed = [layout.card, layout.spec, layout.lock, layout.plan / "plan-00000.parquet"]
    for shard in range(SHARDS):
        name = layout.part_name(shard)
        allowed += [layout.embeddings / name, layout.failures / name, layout.note(shard)]
    names = {str(each).removeprefix("s3://finished/") for each in allowed}
    (report,) = set(of_content(bucket)) - names
    assert report.startswith("out/_resfeat/runs/")
    assert not objects.meta.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")
    sent = Counter(path for method, path, _ in requests if method == "GET")
    tree = {path: count for path, count in sent.items() if path.startswith("/pictures/tree/")}
    # `datasets` would have saved a dataset there, if there were these.
    images = {path: tree[path] for path in tree if not path.endswith(".json")}
    # Each once, but for the sample that is taken first; nothing that is no image is asked for.
    assert len(images) == PHOTOS + 1 + len(BAD)
    assert sum(images.values()) <= len(images) + SAMPLE


def test_no_key_is_told_to_anybody(finished):
    bucket, _, done = finished
    assert SECRET not in done.stdout + done.stderr
    contents = {key: bucket.Object(key).get()["Body"].read() for key in of_content(bucket)}
    assert "out/_resfeat/spec.json" in contents
    assert not [key for key, content in contents.items() if SECRET.encode() in content]


def test_what_reads_a_dataset_reads_one_in_a_store(
    finished, undisturbed, store, resfeat, tree, tmp_path
):
    output, env = "s3://finished/out", store.environment
    status = json.loads(resfeat("status", output, "--json", env=env).stdout)
    assert (status["complete"], status["embedded"], status["failed"]) == (True, PHOTOS + 1, 3)
    assert status["writer"] is None
    verified = resfeat("verify", output, env=env)
    assert verified.returncode == 0 and "Nothing is wrong" in verified.stdout

    query = tree / "twin.jpg"
    sheet = tmp_path / "sheet.png"
    command = ["search", output, query, "-k", 2, "--json", "--sheet", sheet]
    found = resfeat(*command, env=env)
    assert found.returncode == 0, found.stderr
    neighbours = json.loads(found.stdout)[0]["neighbours"]
    twin = ODD["chelsea/00001.jpg"]
    assert {each["id"] for each in neighbours} == {"twin.jpg", twin}
    assert sheet.stat().st_size > 1000

    code = (
        "import resfeat, sys, json\n"
        "dataset = resfeat.open_dataset(sys.argv[1])\n"
        "rows = dataset.embeddings.to_table(columns=['id'])['id'].to_pylist()\n"
        "reasons = dataset.failures.to_table()['reason'].to_pylist()\n"
        "print(json.dumps([rows, reasons]))"
    )
    command = [sys.executable, "-c", code, output]
    read = subprocess.run(command, env={**os.environ, **env}, capture_output=True, check=True)
    ids, reasons = json.loads(read.stdout)
    assert sorted(ids) == rows(undisturbed)["id"].to_pylist()
    assert Counter(reasons) == REASONS


@pytest.mark.more
@pytest.mark.ray
def test_from_disk_to_store_and_from_store_to_disk_by_ray(
    tree, source, bucket, options, undisturbed, proxy, command, tmp_path
):
    """One each way; Ray's worker finds the store by the same variables."""
    env = proxy.environment
    output = f"s3://{bucket.name}/out"
    there = command("extract", tree, "-o", output, *options, "--workers", 1, env=env)
    assert there.returncode == 0, there.stderr
    assert whole(bucket, undisturbed)
    back = tmp_path / "out"
    here = command("extract", source, "-o", back, *options, env=env)
    assert here.returncode == 0, here.stderr
    assert rows(back).select(COLUMNS).equals(rows(undisturbed).select(COLUMNS))


def test_a_bad_network_changes_nothing_but_the_time(
    source, bucket, options, undisturbed, proxy, resfeat
):
    kinds = ("500", "503", "reset", "cut", "lost")
    proxy.faults = RandomFaults(0.2, kinds, seed=7, most=4)
    output = f"s3://{bucket.name}/out"
    done = resfeat("extract", source, "-o", output, *options, env=proxy.environment)
    assert done.returncode == 0, done.stderr
    assert whole(bucket, undisturbed)
    assert set(faults(proxy)) == set(kinds) and faults(proxy).total() > 12
    verified = resfeat("verify", output, env=proxy.environment)
    assert verified.returncode == 0 and "Nothing is wrong" in verified.stdout


def test_requests_that_stall_are_given_up_and_sent_again(
    source, bucket, options, undisturbed, proxy, hasty
):
    stalled = Counter()

    def rule(method, path):
        """The first read of some images, and the first write of two parts, stall."""
        image = method == "GET" and path.startswith("/pictures/tree/") and "0." in path
        part = method == "PUT" and path.endswith(("/part-00000.parquet", "/part-00001.json"))
        if image or part:
            stalled[path] += 1
            return "stall" if stalled[path] == 1 else None
        return None

    proxy.faults = rule
    command = ["extract", source, "-o", f"s3://{bucket.name}/out", *options]
    run = start(*command, env=hasty(proxy, "REQUEST_SECONDS = 1"))
    _, complained = run.communicate(timeout=120)
    assert run.returncode == 0, complained
    assert whole(bucket, undisturbed)
    assert faults(proxy)["stall"] >= 6


def test_a_store_that_goes_away_ends_the_run_in_one_line_and_the_next_goes_on(
    source, bucket, options, undisturbed, proxy, hasty, resfeat
):
    output = f"s3://{bucket.name}/out"
    command = ["extract", source, "-o", output, *options]
    proxy.faults = after_parts(2, lambda: setattr(proxy, "down", True))
    run = start(*command, env=hasty(proxy, "ATTEMPTS = 2"))
    _, complained = run.communicate(timeout=150)
    line = one_line(complained, run.returncode, 1)
    assert "s3://" in line and "give the same command again" in line
    committed = parts(bucket)
    assert 2 <= len(committed) < SHARDS
    ids = table(bucket)["id"].to_pylist()
    assert set(ids) <= set(rows(undisturbed)["id"].to_pylist())

    proxy.down, proxy.faults = False, ()
    proxy.requests.clear()
    done = resfeat(*command, env=proxy.environment)
    assert done.returncode == 0, done.stderr
    assert whole(bucket, undisturbed)
    assert written(proxy, bucket) == set(parts(bucket)) - set(committed)


def test_an_object_that_cannot_be_read_is_a_row_and_one_that_changed_is_counted(
    tree, bucket, options, undisturbed, proxy, resfeat
):
    upload(tree, bucket)
    broken, forbidden, gone, changed = (f"china/000{name}" for name in CHINA)
    # What is listed is what was there; what is read is what is there now.
    photo = (tree / "twin.jpg").read_bytes()

    def change():
        bucket.Object(f"tree/{gone}").delete()
        bucket.put_object(Key=f"tree/{changed}", Body=photo)

    listed = after("/_resfeat/plan/", change)
    answers = {broken: "500", forbidden: "403"}

    def rule(method, path):
        listed(method, path)
        return next((fault for name, fault in answers.items() if path.endswith(name)), None)

    proxy.faults = rule
    command = ["extract", f"s3://{bucket.name}/tree", "-o", f"s3://{bucket.name}/out", *options]
    done = resfeat(*command, env=proxy.environment)
    assert done.returncode == 0, done.stderr
    assert "Changed since they were listed: 1 images, taken as they are now" in done.stdout

    expected = {broken: "io_error", forbidden: "permission", gone: "not_found"}
    failures = {row["id"]: row for row in table(bucket, "failures").to_pylist()}
    given = {name: failures[name]["reason"] for name in expected}
    assert given == expected
    assert set(failures) == {*expected, *BAD}
    assert all(row["message"] and row["stage"] == "read" for row in map(failures.get, expected))
    now = {row["id"]: row["embedding"] for row in table(bucket).to_pylist()}
    before = {row["id"]: row["embedding"] for row in rows(undisturbed).to_pylist()}
    assert now[changed] == before["twin.jpg"]
    assert set(now) == set(before) - set(expected)
    assert {name: now[name] for name in now if name != changed} == {
        name: before[name] for name in now if name != changed
    }

    # And once they can be read again, they are done again.
    bucket.put_object(Key=f"tree/{gone}", Body=(tree / gone).read_bytes())
    bucket.put_object(Key=f"tree/{changed}", Body=(tree / changed).read_bytes())
    proxy.faults = ()
    again = resfeat(*command, "--retry-failed", env=proxy.environment)
    assert again.returncode == 0, again.stderr
    now = {row["id"]: row["embedding"] for row in table(bucket).to_pylist()}
    assert now == {**before, changed: before["twin.jpg"]}


def test_a_run_that_is_killed_at_any_moment_is_gone_on_with(
    source, bucket, options, undisturbed, proxy, resfeat
):
    command = ["extract", source, "-o", f"s3://{bucket.name}/out", *options]
    chance = random.Random(0)
    for _ in range(2):
        before = set(parts(bucket))
        run = start(*command, env={**os.environ, **proxy.environment})
        proxy.requests.clear()
        proxy.faults = killing(run, after=chance.randint(0, 8))
        _, complained = run.communicate(timeout=120)
        assert run.returncode == -signal.SIGKILL, complained
        proxy.faults = ()
        assert before < set(parts(bucket))
        assert not before & written(proxy, bucket)
    before = set(parts(bucket))
    proxy.requests.clear()
    done = resfeat(*command, env=proxy.environment)
    assert done.returncode == 0, done.stderr
    assert f"the last run (process {run.pid} on {os.uname().nodename}" in done.stderr
    assert "was killed" in done.stderr
    assert whole(bucket, undisturbed)
    assert written(proxy, bucket) == set(parts(bucket)) - before
    assert Writer.parse(bucket.Object("out/_resfeat/locks/all").get()["Body"].read()) is None


def killing(process, after):
    """A rule: so many requests after it committed a part, the process is killed."""
    count = iter(range(after))
    committed = []

    def rule(method, path):
        if committed and next(count, None) is None:
            process.kill()
        elif method == "PUT" and "/embeddings/part-" in path:
            committed.append(path)

    return rule


def written(proxy, bucket):
    """Keys of the parts that were written, as the proxy saw it."""
    paths = {path for method, path, _ in proxy.requests if method == "PUT"}
    return {path.removeprefix(f"/{bucket.name}/") for path in paths if "/embeddings/part-" in path}


def test_of_two_that_begin_together_one_is_refused_by_name(
    source, bucket, options, undisturbed, proxy
):
    output = f"s3://{bucket.name}/out"
    command = ["extract", source, "-o", output, *options]
    env = {**os.environ, **proxy.environment}
    runs = [start(*command, env=env) for _ in range(2)]
    told = [run.communicate(timeout=200) for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1], told
    won, lost = sorted(runs, key=lambda run: run.returncode)
    complained = told[runs.index(lost)][1]
    line = error_of(complained)
    assert line.startswith(f"Error: {output} is being written by process {won.pid} on ")
    assert whole(bucket, undisturbed)


def test_a_part_that_was_damaged_is_named_sent_back_and_done_again(
    finished, source, bucket, options, undisturbed, proxy, resfeat
):
    env = proxy.environment
    output = f"s3://{bucket.name}/out"
    for each in finished[0].objects.all():
        bucket.Object(each.key).copy_from(CopySource={"Bucket": "finished", "Key": each.key})
    damaged, removed = "out/embeddings/part-00001.parquet", "out/embeddings/part-00003.parquet"
    content = bucket.Object(damaged).get()["Body"].read()
    bucket.put_object(Key=damaged, Body=content[: len(content) // 2])
    bucket.Object(removed).delete()
    found = resfeat("verify", output, "--repair", env=env)
    assert found.returncode == 1
    for name in (damaged, removed):
        assert f"s3://{bucket.name}/{name}: " in found.stdout
    assert "Sent back: 2 shards" in found.stdout
    proxy.requests.clear()
    again = resfeat("extract", source, "-o", output, *options, env=env)
    assert again.returncode == 0, again.stderr
    assert whole(bucket, undisturbed)
    assert written(proxy, bucket) == {damaged, removed}


@pytest.mark.parametrize(
    ("sources", "output", "code", "says"),
    [
        (["s3://nowhere-at-all/tree"], "{out}", 2, "source s3://nowhere-at-all/tree does not"),
        (["{source}/nothing/here"], "{out}", 2, "source {source}/nothing/here does not exist"),
        (["{source}", "{source}/china"], "{out}", 2, "lies within"),
        (["{source}"], "s3://nowhere-at-all/out", 1, "s3://nowhere-at-all/out"),
        (["{source}"], "{source}", 2, "is also a source"),
        (["{source}"], "s3://pictures", 2, "holds other files"),
        (["{source}"], "{source}/twin.jpg", 2, "is a file"),
        (["{source}/nothing"], "{out}", 2, "no images in"),
        (["{source}/.trash"], "s3://", 2, "no address"),
        (["{source}"], "gcs://bucket/out", 2, "no address"),
        (["{source}"], "az://container/out", 2, "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(
    sources, output, code, says, source, tree, bucket, options, store, resfeat, objects
):
    names = {"source": source, "tree": tree, "out": f"s3://{bucket.name}/out"}
    before = of_content(objects.Bucket("pictures"))
    sources = [each.format(**names) for each in sources]
    command = ["extract", *sources, "-o", output.format(**names), *options]
    done = resfeat(*command, env=store.environment)
    assert says.format(**names) in one_line(done.stderr, done.returncode, code)
    # A lock that names nobody is never removed; see lease.py.
    assert set(of_content(bucket)) <= {"out/_resfeat/locks/all"}
    assert of_content(objects.Bucket("pictures")) == before


@pytest.fixture
def guarded(store):
    """A store that checks who asks."""
    keys = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET}

    def allow(requests):
        header = {"Content-Type": "text/plain"}
        urlopen(Request(f"{store.endpoint}/moto-api/reset-auth", requests, header)).close()

    allow(b"0")
    yield {**store.environment, **keys}
    allow(b"inf")


def test_wrong_keys_are_refused_in_one_line(guarded, source, tree, options, resfeat, tmp_path):
    output, table = tmp_path / "out", tmp_path / "list.txt"
    table.write_text("s3://pictures/tree/twin.jpg")
    for command in (
        ["extract", source, "-o", output, *options],
        ["extract", table, "-o", tmp_path / "of table", *options],
        ["extract", tree, "-o", "s3://pictures/out", *options],
        ["status", "s3://pictures/out"],
    ):
        began = time.monotonic()
        done = resfeat(*command, env=guarded)
        assert time.monotonic() - began < 30
        assert (
            "s3://pictures/" in (line := one_line(done.stderr, done.returncode, 1))
            and "AWS_* variables" in line
        )
        assert SECRET not in done.stdout + done.stderr
    assert not output.exists()
