"""A few small pictures, and the quickest way to embed them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from tables import rows

from resfeat import ExtractSpec, RuntimeOptions, extract

COUNT = 9
# For the command: shards of eight.
QUICK = ["--model", "cifar_resnet20", "--weights", "random:0", "--runtime", "torch",
         "--shard-size", "8", "--max-error-rate", "1"]  # fmt: skip


def write_pictures(folder: Path, count: int = COUNT) -> list[Path]:
    """Pictures of chance: JPEG and PNG, one with a space in its name, in two folders."""
    paths = [folder / ("a" if n % 2 else "b b") / f"{n} é.png" for n in range(count)]
    paths = [path if n % 3 else path.with_name(f"{n}.jpg") for n, path in enumerate(paths)]
    for n, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 80)).save(path)
    return sorted(paths)


def embed(output: Path, *sources: object, **more: Any):
    """The report of an extraction with a small network."""
    runtime = RuntimeOptions(workers=0, runtime="torch", batch_size=4)
    spec = ExtractSpec(sources=tuple(map(str, sources)), output=str(output), runtime=runtime,
                       model="cifar_resnet20", weights="random:0", **more)  # fmt: skip
    return extract(spec)


def vectors_of(output: Path) -> dict[str, bytes]:
    """The bits of each embedding, by id."""
    table = rows(output)
    return {
        name: np.asarray(vector, np.float32).tobytes()
        for name, vector in zip(
            table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True
        )
    }


def embedded_pictures(folder: Path) -> tuple[list[Path], list[bytes]]:
    """Pictures, and the bits of their embeddings from the directory. Not to be changed."""
    paths = write_pictures(folder)
    embed(folder / "out", *{path.parent for path in paths})
    return paths, sorted(vectors_of(folder / "out").values())


def failures_of(output: Path) -> dict[str, str]:
    """The reason of each failure, by id."""
    if not (output / "failures").exists():
        return {}
    table = rows(output, "failures")
    return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def messages_of(output: Path) -> dict[str, str]:
    table = rows(output, "failures")
    return dict(zip(table["id"].to_pylist(), table["message"].to_pylist(), strict=True))


def image_table(paths: Sequence[Path], **more: list[Any]) -> pa.Table:
    """Pictures as `datasets` has them in Arrow."""
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(images, kind), **more})
