"""The tools that people use for this job, each as its own documentation shows it.

    python tests/benchmarks/peers.py NAME FOLDER MODEL

embeds FOLDER/in/*.jpg with FOLDER/weights.pth, the state dict of one of torchvision's ResNets, on
the CPU, writes to FOLDER/NAME and prints a line of JSON. `bench.py` runs each contender so, in a
process of its own and, where it is told to, an environment of its own: nothing is imported here
but by the contender that needs it. All take batches of 32, and two loader processes where they have
them; all but lightly-train, which squashes, resize and crop as torchvision's weights ask for.

Seconds are from the first batch's request to the last row on disk, without imports and start-up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH_SIZE = 32
LOADERS = 2


def dataloader(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, Any]:
    """torchvision's inference example on a DataLoader, pyarrow at the end."""
    import torch
    from PIL import Image

    class Photos(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.paths = sorted(photos.rglob("*.jpg"))
            self.transforms = _transforms(model)

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int):
            return str(self.paths[number]), self.transforms(
                Image.open(self.paths[number]).convert("RGB")
            )

    network = _headless(model, checkpoint)
    started = time.perf_counter()
    names, embeddings = [], []
    with torch.inference_mode():
        for paths, batch in torch.utils.data.DataLoader(
            Photos(), batch_size=BATCH_SIZE, num_workers=LOADERS
        ):
            names += paths
            embeddings.append(network(batch))
    _write(names, torch.cat(embeddings), output)
    return {"images": len(names), "seconds": time.perf_counter() - started}


def timm(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, Any]:
    """The loop of timm's inference.py, without the classifier."""
    import torch
    from timm import create_model
    from timm.data import create_dataset, create_loader, resolve_data_config

    network = create_model(model, checkpoint_path=str(checkpoint))
    network.reset_classifier(0)
    network.eval()
    resize, crop, interpolation = _pixels(model)
    asked = {"crop_pct": crop / resize, "interpolation": interpolation}
    loader = create_loader(
        create_dataset("", root=str(photos)),
        batch_size=BATCH_SIZE,
        use_prefetcher=True,
        num_workers=LOADERS,
        device=torch.device("cpu"),
        **resolve_data_config(asked, model=network),
    )
    started = time.perf_counter()
    with torch.inference_mode():
        embeddings = [network(batch) for batch, _ in loader]
    names = loader.dataset.filenames()
    _write(names, torch.cat(embeddings), output)
    return {"images": len(names), "seconds": time.perf_counter() - started}


def lightly_train(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, Any]:
    """`lightly_train.embed`. Its seconds hold the reading of the checkpoint too, a tenth of one."""
    # It and albumentations report home, and wait for an answer, unless they are told not to.
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    import lightly_train
    import torch

    theirs = output.with_suffix(".ckpt")
    _lightly_checkpoint(model, checkpoint, theirs)
    written = output.with_suffix(".pt")
    started = time.perf_counter()
    lightly_train.embed(
        out=written,
        data=photos,
        checkpoint=theirs,
        format="torch",
        batch_size=BATCH_SIZE,
        num_workers=LOADERS,
        accelerator="cpu",
    )
    seconds = time.perf_counter() - started
    return {"images": len(torch.load(written)["filenames"]), "seconds": seconds}


def _lightly_checkpoint(model: str, checkpoint: Path, theirs: Path) -> None:
    """What its training would leave: it embeds from nothing else, and would change the weights."""
    import torch
    from lightly_train._checkpoint import (
        Checkpoint,
        CheckpointLightlyTrain,
        CheckpointLightlyTrainModels,
    )
    from lightly_train._models.embedding_model import EmbeddingModel
    from lightly_train._models.package_helpers import get_wrapped_model
    from lightly_train._transforms.transform import NormalizeArgs
    from torchvision.models import get_model

    network = get_model(model)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    wrapped = get_wrapped_model(network, num_input_channels=3)
    models = CheckpointLightlyTrainModels(network, wrapped, EmbeddingModel(wrapped))
    about = CheckpointLightlyTrain.from_now(models, NormalizeArgs())
    Checkpoint(network.state_dict(), about).save(theirs)


def thingsvision(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, Any]:
    """The steps of its README, for a model of torchvision; its loader has no processes."""
    from thingsvision import get_extractor
    from thingsvision.utils.data import DataLoader, ImageDataset
    from thingsvision.utils.storing import save_features

    extractor = get_extractor(
        model_name=model,
        source="torchvision",
        device="cpu",
        pretrained=False,
        model_path=str(checkpoint),
    )
    resize, crop, _ = _pixels(model)
    dataset = ImageDataset(
        root=str(photos),
        out_path=str(output),
        backend=extractor.get_backend(),
        transforms=extractor.get_transformations(resize_dim=resize, crop_dim=crop),
    )
    batches = DataLoader(dataset, batch_size=BATCH_SIZE, backend=extractor.get_backend())
    started = time.perf_counter()
    features = extractor.extract_features(
        batches=batches, module_name="avgpool", flatten_acts=True, output_type="ndarray"
    )
    save_features(features, out_path=str(output), file_format="npy")
    return {"images": len(features), "seconds": time.perf_counter() - started}


def ray_data(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, Any]:
    """The steps of its batch inference guide: read_images, map, map_batches, write_parquet."""
    import ray
    import torch
    from torchvision.transforms.functional import to_pil_image

    transforms = _transforms(model)

    def preprocess(row):
        row["image"] = transforms(to_pil_image(row["image"])).numpy()
        return row

    class Embed:
        def __init__(self) -> None:
            self.network = _headless(model, checkpoint)

        def __call__(self, batch):
            with torch.inference_mode():
                embeddings = self.network(torch.as_tensor(batch["image"])).numpy()
            return {"id": batch["path"], "embedding": embeddings}

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    started = time.perf_counter()
    images = ray.data.read_images(str(photos), mode="RGB", include_paths=True)
    done = images.map(preprocess).map_batches(Embed, concurrency=1, batch_size=BATCH_SIZE)
    done.write_parquet(str(output))
    seconds = time.perf_counter() - started
    return {"images": images.count(), "seconds": seconds}


def resfeat(*options: str) -> Callable[..., dict[str, Any]]:
    """resfeat extract, with these options."""

    def embed(photos: Path, output: Path, checkpoint: Path, model: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "resfeat", "extract", photos, "-o", output,
                   "--model", model, "--weights", checkpoint, *options, "--log-json"]  # fmt: skip
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        report = json.loads(done.stdout.splitlines()[-1])
        return {name: report[name] for name in ("images", "seconds", "start_seconds")}

    return embed


def _transforms(model: str) -> Callable[[Any], Any]:
    from torchvision.models import get_model_weights

    return get_model_weights(model).DEFAULT.transforms()


def _pixels(model: str) -> tuple[int, int, str]:
    """Short side, crop and interpolation of the same."""
    transforms: Any = _transforms(model)
    return transforms.resize_size[0], transforms.crop_size[0], transforms.interpolation.value


def _headless(model: str, checkpoint: Path) -> Any:
    import torch
    from torchvision.models import get_model

    network = get_model(model)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.fc = torch.nn.Identity()
    return network.eval()


def _write(names: list[str], embeddings: Any, output: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": names, "embedding": list(embeddings.numpy())}), output)


@dataclass(frozen=True)
class Contender:
    """embed(photos, output, checkpoint, model) gives images, seconds and, of resfeat, its own
    start_seconds. package: what it needs, as PyPI calls it."""

    embed: Callable[..., dict[str, Any]]
    package: str


CONTENDERS = {
    "torchvision + DataLoader": Contender(dataloader, "torchvision"),
    "timm": Contender(timm, "timm"),
    "lightly-train": Contender(lightly_train, "lightly-train"),
    "thingsvision": Contender(thingsvision, "thingsvision"),
    "Ray Data": Contender(ray_data, "ray"),
    "resfeat on Ray": Contender(resfeat(), "resfeat"),
    "resfeat --workers 0": Contender(resfeat("--workers", "0"), "resfeat"),
    "resfeat --workers 0, --runtime torch": Contender(
        resfeat("--workers", "0", "--runtime", "torch"), "resfeat"
    ),
    "resfeat --workers 0, bf16": Contender(
        resfeat("--workers", "0", "--precision", "bf16"), "resfeat"
    ),
    "resfeat --workers 0, int8": Contender(
        resfeat("--workers", "0", "--precision", "int8"), "resfeat"
    ),
}


def main(name: str, folder: str, model: str) -> None:
    """Run one contender and print what came of it."""
    here, contender = Path(folder), CONTENDERS[name]
    measured = contender.embed(here / "in", here / name, here / "weights.pth", model)
    versions = {package: version(package) for package in (contender.package, "torch")}
    print(json.dumps({**measured, "versions": versions}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
