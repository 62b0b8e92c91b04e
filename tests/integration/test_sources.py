"""The same photographs from every kind of source: the same bits, and the same ids where a kind of
source has ids of its own."""

import http.server
import json
import shutil
import subprocess
import tarfile
import threading
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from azure import AzureStore, azurite
from gcs import GoogleStore
from later import Later
from object_store import ObjectStore
from tables import rows

from resfeat.storage import Fence, locate, remote, write_whole

boto3 = Later("boto3")
datasets = Later("datasets")
pandas = Later("pandas")
polars = Later("polars")

COUNT = 100
FEATURES = ["--model", "cifar_resnet20", "--weights", "random:0", "--resize", "36", "--crop", "32"]
PLACED = ["--workers", "0", "--runtime", "torch", "--shard-size", "48"]
LONG = "a-folder-with-a-name-of-many-letters/" * 4  # 148: more than a header of a tar holds


@pytest.fixture(scope="module")
def folder(photos, once) -> Path:
    """The photographs, and a file that is no image. Not to be changed."""

    def write(folder):
        for photo in sorted(photos.rglob("*.*"))[:: 500 // COUNT][:COUNT]:
            place = folder / "photos" / photo.parent.name / photo.name
            place.parent.mkdir(parents=True, exist_ok=True)
            # No link: GNU tar fails where others make one of their own to the same file meanwhile.
            shutil.copy2(photo, place)
        (folder / "photos" / "broken.jpg").write_bytes(b"not an image at all")

    return once("same-photographs", write) / "photos"


@pytest.fixture(scope="module")
def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


@pytest.fixture(scope="module")
def expected(folder, once, resfeat):
    """id -> what every kind of source must give; None for what fails."""

    def write(place):
        done = resfeat("extract", folder, "-o", place / "out", *FEATURES, *PLACED)
        assert done.returncode == 0, done.stderr

    return outcome(once("same-photographs-embedded", write) / "out")


def outcome(output):
    made = {row["id"]: (row["embedding"], row["width"], row["height"])
            for row in rows(output).to_pylist()}  # fmt: skip
    failed = {row["id"]: row["reason"] for row in rows(output, "failures").to_pylist()}
    assert not made.keys() & failed.keys()
    return made | failed


@pytest.fixture
def extracted(resfeat, tmp_path):
    def extract(*arguments, **options):
        done = resfeat("extract", *arguments, "-o", tmp_path / "out", *FEATURES, *PLACED, **options)
        assert done.returncode == 0, done.stderr
        return outcome(tmp_path / "out")

    return extract


def test_what_is_compared(expected, names):
    assert len(names) == COUNT + 1 and set(expected) == set(names)
    assert [name for name, given in expected.items() if given == "unidentified"] == ["broken.jpg"]
    assert len({str(given) for given in expected.values()}) > 0.9 * COUNT


def under(prefix, given):
    assert all(name.startswith(prefix) for name in given)
    return {name.removeprefix(prefix): each for name, each in given.items()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_of_python(form, folder, names, expected, extracted, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w", format=form) as tar:
        for name in names:
            tar.add(folder / name, name)
    assert under("photos.tar#", extracted(tmp_path / "photos.tar")) == expected


@pytest.mark.parametrize("form", ["ustar", "posix", "gnu"])
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_tar_of_gnu(form, ending, folder, expected, extracted, tmp_path):
    path = tmp_path / f"photos.{ending}"
    pack = ["tar", f"--format={form}", f"--transform=s,^,{LONG},", "-caf", path, "-C", folder]
    subprocess.run([*pack, *sorted(each.name for each in folder.iterdir())], check=True)
    assert under(f"photos.{ending}#{LONG}", extracted(path)) == expected


def contents(folder, names):
    return [(folder / name).read_bytes() for name in names]


def by_datasets(path, folder, names):
    features = datasets.Features({"name": datasets.Value("string"), "image": datasets.Image()})
    images = [{"bytes": content, "path": None} for content in contents(folder, names)]
    made = datasets.Dataset.from_dict({"name": names, "image": images}, features=features)
    made.to_parquet(path)


def by_pandas(path, folder, names):
    pandas.DataFrame({"name": names, "image": contents(folder, names)}).to_parquet(path)


def by_polars(path, folder, names):
    polars.DataFrame({"name": names, "image": contents(folder, names)}).write_parquet(path)


@pytest.mark.parametrize("write", [by_datasets, by_pandas, by_polars])
def test_a_parquet_file_of_images(write, folder, names, expected, extracted, tmp_path):
    write(str(tmp_path / "photos.parquet"), folder, names)
    assert extracted(tmp_path / "photos.parquet", "--id-column", "name") == expected


def test_a_dataset_that_was_saved(folder, names, expected, extracted, tmp_path):
    images = [{"bytes": content, "path": None} for content in contents(folder, names)]
    features = datasets.Features({"name": datasets.Value("string"), "image": datasets.Image()})
    made = datasets.Dataset.from_dict({"name": names, "image": images}, features=features)
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    assert extracted(tmp_path / "saved", "--id-column", "name") == expected


def test_a_table_of_paths(folder, names, expected, extracted, tmp_path):
    table = tmp_path / "photos.csv"
    pandas.DataFrame({"path": [folder / name for name in names], "name": names}).to_csv(table)
    assert extracted(table, "--id-column", "name") == expected


def test_a_web_server(folder, names, expected, extracted, tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_): ...

    handler = partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        table = tmp_path / "photos.jsonl"
        lines = [json.dumps({"url": f"{address}/{name}", "name": name}) for name in names]
        table.write_text("\n".join(lines))
        assert extracted(table, "--id-column", "name") == expected
        server.shutdown()


def test_s3(folder, names, expected, extracted):
    with ObjectStore() as store:
        client = boto3.client(
            "s3", endpoint_url=store.endpoint, region_name="us-east-1",
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip
        client.create_bucket(Bucket="photos")
        for name in names:
            client.put_object(Bucket="photos", Key=f"in/{name}", Body=(folder / name).read_bytes())
        assert extracted("s3://photos/in", env=store.environment) == expected


@pytest.mark.parametrize(("kind", "scheme"), [(AzureStore, "az"), (GoogleStore, "gs")])
def test_other_stores(kind, scheme, folder, names, expected, extracted, monkeypatch):
    if kind is AzureStore and not azurite():
        pytest.skip("azurite is not installed")
    with kind() as store:
        store.make("photos")
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        remote.store.cache_clear()
        for name in names:
            place = locate(f"{scheme}://photos/in") / name
            write_whole(Fence(), place, (folder / name).read_bytes())
        assert extracted(f"{scheme}://photos/in", env=store.environment) == expected


def test_several_kinds_on_one_command_line(folder, names, expected, extracted, tmp_path):
    """A folder, a tar and a table, each of a part of the photographs."""
    parts = [names[place::3] for place in range(3)]
    for name in parts[0]:
        place = tmp_path / "some" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.hardlink_to(folder / name)
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for name in parts[1]:
            tar.add(folder / name, name)
    table = tmp_path / "rest.csv"
    rest = {"path": [folder / name for name in parts[2]], "place": range(len(parts[2]))}
    pandas.DataFrame(rest | {"name": parts[2]}).to_csv(table)
    given = extracted(tmp_path / "some", tmp_path / "more.tar", table, "--id-column", "name",
                      "--keep", "place")  # fmt: skip
    assert given == (
        {f"some/{name}": expected[name] for name in parts[0]}
        | {f"more.tar#{name}": expected[name] for name in parts[1]}
        | {name: expected[name] for name in parts[2]}
    )
    kept = ds.dataset(tmp_path / "out" / "embeddings").to_table(["id", "place"])
    assert kept.schema.field("place").type == pa.string()
    places = dict(zip(*kept.to_pydict().values(), strict=True))
    failed = {name for name, each in expected.items() if isinstance(each, str)}
    # Of a CSV, text.
    assert all(places[name] == str(parts[2].index(name)) for name in set(parts[2]) - failed)
    assert places[f"some/{parts[0][0]}"] is None
