"""resfeat against the tools that people use for this job: one run, one machine, the same images.

    python tests/benchmarks/peers.py [--count 400] [--model resnet50] [--only NAME ...]

Each contender is a process of its own, embeds the same JPEGs with the same random weights, and is
written the way its own documentation shows. Rates are images by the seconds from the first batch's
request to the last row on disk, without imports and start-up; those are shown apart. Prints a table
and writes it, with the machine, to RESULTS.md beside this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import click
from PIL import Image

from resfeat.machine import hardware
from resfeat.report import versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "pipelines"))


def dataloader(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, float]:
    """torchvision's inference example on a DataLoader, pyarrow at the end."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from torchvision.models import get_model, get_model_weights

    class Photos(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.paths = sorted(photos.rglob("*.jpg"))
            self.transforms = get_model_weights(model).DEFAULT.transforms()

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int):
            return str(self.paths[number]), self.transforms(
                Image.open(self.paths[number]).convert("RGB")
            )

    network = get_model(model)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval()
    started = time.perf_counter()
    names, embeddings = [], []
    with torch.inference_mode():
        for paths, batch in torch.utils.data.DataLoader(Photos(), batch_size=32, num_workers=2):
            names += paths
            embeddings.append(network(batch))
    table = pa.table({"id": names, "embedding": list(torch.cat(embeddings).numpy())})
    pq.write_table(table, output)
    return {"images": len(names), "seconds": time.perf_counter() - started}


def ray_data(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, float]:
    """The steps of its batch inference guide: read_images, map, map_batches, write_parquet."""
    import ray
    import torch
    from torchvision.models import get_model, get_model_weights
    from torchvision.transforms.functional import to_pil_image

    transforms = get_model_weights(model).DEFAULT.transforms()

    def preprocess(row):
        row["image"] = transforms(to_pil_image(row["image"])).numpy()
        return row

    class Embed:
        def __init__(self) -> None:
            self.network = get_model(model)
            self.network.load_state_dict(torch.load(checkpoint, weights_only=True))
            self.network.fc = torch.nn.Identity()
            self.network.eval()

        def __call__(self, batch):
            with torch.inference_mode():
                embeddings = self.network(torch.as_tensor(batch["image"])).numpy()
            return {"id": batch["path"], "embedding": embeddings}

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    started = time.perf_counter()
    images = ray.data.read_images(str(photos), mode="RGB", include_paths=True)
    done = images.map(preprocess).map_batches(Embed, concurrency=1, batch_size=32)
    done.write_parquet(str(output))
    seconds = time.perf_counter() - started
    return {"images": images.count(), "seconds": seconds}


def resfeat_inline(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, float]:
    """resfeat extract --workers 0"""
    return _resfeat(photos, output, checkpoint, model, "0")


def resfeat_ray(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, float]:
    """resfeat extract, as it is: on Ray"""
    return _resfeat(photos, output, checkpoint, model, "auto")


def _resfeat(photos, output, checkpoint, model, workers) -> dict[str, float]:
    command = [sys.executable, "-m", "resfeat", "extract", photos, "-o", output, "--model", model,
               "--weights", checkpoint, "--workers", workers, "--log-json"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


CONTENDERS = {
    "torchvision + DataLoader": dataloader,
    "Ray Data": ray_data,
    "resfeat --workers 0": resfeat_inline,
    "resfeat on Ray": resfeat_ray,
}


@click.command()
@click.option("--count", default=400, show_default=True)
@click.option("--model", default="resnet50", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)))
@click.option("--one", hidden=True, nargs=2)
def main(count: int, model: str, only: tuple[str, ...], one: tuple[str, str] | None) -> None:
    """Run the contenders in turn and print their rates and ratios."""
    if one:
        name, folder = one[0], Path(one[1])
        measured = CONTENDERS[name](folder / "in", folder / name, folder / "weights.pth", model)
        print(json.dumps({"images": measured["images"], "seconds": measured["seconds"]}))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), count, model)
        rows = {name: measure(name, folder, model) for name in only or CONTENDERS}
    table = as_table(rows, count, model)
    print(table)
    if not only:
        (HERE / "RESULTS.md").write_text(table)


def prepare(folder: Path, count: int, model: str) -> None:
    """JPEGs of 500 x 375, and a checkpoint for everybody."""
    import torch
    from photos import write_photos
    from torchvision.models import get_model

    (folder / "in").mkdir()
    for number, path in enumerate(write_photos(folder / "photos", count)):
        with Image.open(path) as photo:
            photo.convert("RGB").resize((500, 375)).save(folder / "in" / f"{number:05d}.jpg")
    torch.manual_seed(0)
    torch.save(get_model(model).state_dict(), folder / "weights.pth")


def measure(name: str, folder: str, model: str) -> dict[str, float]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    command = [sys.executable, __file__, "--model", model, "--one", name, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    return {**measured, "whole": time.perf_counter() - started}


def as_table(rows: dict[str, dict[str, float]], count: int, model: str) -> str:
    machine, library = hardware(), versions()
    slowest = next(iter(rows.values()))
    text = f"""# Measured

`make bench`, {date.today()}: {model}, {count} JPEGs of 500 x 375, fp32, in one run on
{machine["cpus"]} cores ({machine["cpu"]}), {machine["memory_bytes"] / 2**30:.0f} GiB, no GPU;
Python {library["python"]}, torch {library["torch"]}, Ray {library["ray"]}.

| | images/s | ratio to the first | whole process, s |
| --- | ---: | ---: | ---: |
"""
    for name, row in rows.items():
        rate = row["images"] / row["seconds"]
        ratio = rate / (slowest["images"] / slowest["seconds"])
        text += f"| {name} | {rate:.1f} | {ratio:.2f} | {row['whole']:.1f} |\n"
    return text


if __name__ == "__main__":
    main()
