"""Every recipe of RECIPES.md is run as it stands, on one small dataset, and gives what is there."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from small import embed
from tables import rows, vectors

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "RECIPES.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def blocks(title: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", SECTIONS[title], re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def home(once):
    """A folder with photographs, and `embeddings` of them. Not to be changed."""

    def write(folder: Path) -> None:
        from PIL import Image

        for n in range(12):
            place = folder / "photos" / ("dog", "cat")[n % 2] / f"{n}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(n).integers(0, 255, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(place)
        odd = folder / "photos" / "dog" / "tab\tand \\n.jpg"
        (folder / "photos" / "dog" / "10.jpg").rename(odd)
        embed(folder / "embeddings", folder / "photos", label_from="parent", shard_size=5)

    return once("recipes", write)


@pytest.fixture
def recipe(home, resfeat, tmp_path, monkeypatch):
    """Run the blocks of a section in a folder of its own, which sees the dataset: what each leaves
    in its variables."""
    (tmp_path / "embeddings").symlink_to(home / "embeddings")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def run(title: str) -> list[dict[str, object]]:
        left = []
        for number, block in enumerate(blocks(title)):
            file = tmp_path / f"recipe{number}.py"
            file.write_text(block)
            left.append(runpy.run_path(str(file), run_name="__main__"))
        return left

    return run


@pytest.fixture
def expected(home):
    table = rows(home / "embeddings")
    return table["id"].to_pylist(), vectors(table)


def nearest(expected, name: str, count: int = 5) -> list[str]:
    ids, given = expected
    units = given / np.linalg.norm(given, axis=1, keepdims=True)
    order = np.argsort(-(units @ units[ids.index(name)]), kind="stable")
    return [ids[n] for n in order[:count]]


def sorted_rows(given: object) -> np.ndarray:
    array = np.asarray(given)
    return array[np.lexsort(array.T)]


def test_each_section_is_tried_here():
    code = Path(__file__).read_text()
    assert len(SECTIONS) == 9
    assert [title for title in SECTIONS if f'recipe("{title}")' not in code] == []
    assert all(blocks(title) for title in SECTIONS)


def test_duckdb(recipe, expected, capsys):
    recipe("DuckDB")
    told = capsys.readouterr().out
    near = [name for name in nearest(expected, "cat/1.jpg") if "tab" not in name]
    assert len(near) >= 4
    places = [told.index(f" {name} ") for name in near]
    assert places == sorted(places)


def test_polars(recipe, expected, capsys):
    (left,) = recipe("Polars")
    assert np.array_equal(sorted_rows(left["vectors"]), sorted_rows(expected[1]))
    assert "(12, 64)" in capsys.readouterr().out


def test_pandas(recipe, expected):
    (left,) = recipe("pandas")
    assert np.array_equal(sorted_rows(left["vectors"]), sorted_rows(expected[1]))
    assert list(left["centres"].index) == ["cat", "dog"]


def test_datasets(recipe, expected):
    (left,) = recipe("Hugging Face datasets")
    assert np.array_equal(sorted_rows(left["rows"]["embedding"]), sorted_rows(expected[1]))
    assert sorted(left["rows"]["id"]) == expected[0]


def test_faiss(recipe, expected, resfeat, home):
    pytest.importorskip("faiss")
    assert resfeat("export", home / "embeddings", "--to", "npy", "vectors").returncode == 0
    first, second = recipe("FAISS, without a copy")
    ids, given = expected
    assert first["index"].ntotal == 12
    query = first["vectors"][0]
    near = np.argsort(((given - query) ** 2).sum(axis=1))[:5]
    found = [first["table"]["id"][int(n)].as_py() for n in first["places"][0]]
    assert found == [ids[n] for n in near]
    assert second["places"][:, 0].tolist() == [0, 1, 2]


def test_lancedb(recipe, expected):
    pytest.importorskip("lancedb")
    (left,) = recipe("LanceDB")
    assert left["table"].count_rows() == 12
    ids, given = expected
    (own,) = np.flatnonzero((given == left["query"]).all(axis=1))
    found = left["table"].search(left["query"]).metric("cosine").limit(5).to_arrow()
    assert found["id"].to_pylist() == nearest(expected, ids[own])


def test_torch(recipe, expected):
    (left,) = recipe("A PyTorch Dataset")
    assert np.array_equal(sorted_rows(left["rows"].tensors[0]), sorted_rows(expected[1]))
    assert left["labels"].tolist().count(0) == 6 and np.isfinite(float(left["loss"]))


def test_pgvector(recipe, expected):
    """Read as COPY does: fields by tabs, then escapes."""
    recipe("pgvector")
    plain = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}
    found = {}
    for line in Path("images.copy").read_text(encoding="utf-8").splitlines():
        name, vector = line.split("\t")
        name = re.sub(r"\\(.)", lambda escape: plain[escape[1]], name)
        found[name] = np.array(vector.strip("[]").split(","), np.float32)
    assert sorted(found) == expected[0] and "dog/tab\tand \\n.jpg" in found
    assert np.array_equal(np.stack([found[name] for name in expected[0]]), expected[1])


@pytest.mark.ray
def test_ray(recipe, expected):
    from command import share_ray

    share_ray()
    (left,) = recipe("Ray Data")
    found = {row["id"]: row["length"] for row in left["found"]}
    assert sorted(found) == expected[0]
    lengths = np.linalg.norm(expected[1], axis=1)
    assert np.allclose([found[name] for name in expected[0]], lengths, rtol=1e-6)
