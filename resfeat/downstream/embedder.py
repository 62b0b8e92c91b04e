"""`Embedder`: images to embeddings in this process, bit for bit as `extract` makes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resfeat.backbones.weights import Weights, resolve
from resfeat.dataset import ALL, Dataset, open_dataset
from resfeat.decoding import Loaded, Picture, decode_image, load, quiet
from resfeat.errors import Failure, ResfeatError, UsageError, no_embedding
from resfeat.fidelity import is_intact
from resfeat.keywords import (
    Address,
    EmbedderKeywords,
    PlaceKeywords,
    check_names,
    feature_spec,
    runtime_options,
)
from resfeat.sources import Item, item_of
from resfeat.spec import FeatureSpec, RuntimeOptions
from resfeat.worker import Job
from resfeat.worker.worker import Worker, network_for, place_here

# A path or an address; a file's bytes; an image of Pillow's; RGB pixels uint8 [H, W, 3].
Picturelike = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8] | Item
# Decoded at a time, to be embedded next.
CHUNK = 256


class Embedder:
    """Images to embeddings, with the pixels and the identity of `extract`.

        embedder = resfeat.Embedder(model="resnet18", weights="finetuned.pth")
        embedder = resfeat.Embedder.of("embeddings")  # as the images of a dataset were embedded
        vectors = embedder(["cat.jpg", "dog.jpg"])    # float32 [2, D]

    The keywords are the fields of `FeatureSpec`, and those of `RuntimeOptions` that say how to run
    in one process. Raises UsageError for an impossible choice, and ResfeatError for weights that
    cannot be read.

    In Ray Data it is the class that `map_batches` takes: called with a batch, a dict of columns, it
    gives the batch with embeddings beside. column: that of the images, of their bytes or paths.

        images = ray.data.read_binary_files("photos", include_paths=True)
        images.map_batches(resfeat.Embedder, fn_constructor_kwargs={"model": "resnet18"},
                           batch_size=64, concurrency=2)
    """

    def __init__(self, *, column: str = "bytes", **asked: Unpack[EmbedderKeywords]) -> None:
        known = [*EmbedderKeywords.__annotations__, "column"]
        check_names("Embedder()", asked, known)
        features = feature_spec(asked)
        if features.precision == "int8":
            raise UsageError(
                "int8 is calibrated on the images of a dataset: extract some with it, and take "
                "Embedder.of(OUT)"
            )
        self._start(resolve(features), runtime_options(asked))
        self._column = column

    @classmethod
    def of(
        cls,
        output: Address | Dataset,
        layer: str | None = None,
        *,
        column: str = "bytes",
        **place: Unpack[PlaceKeywords],
    ) -> Self:
        """The embedder of a dataset: it gives what the dataset has for the same images. layer:
        which embedding of several; the last by default.

        It runs as the last run of the dataset did, with its batch size, on a GPU if that did and
        there is one here. Where it cannot, or is told otherwise, embeddings may differ in the last
        bits. Raises UsageError for an unknown layer, and ResfeatError where no such embeddings can
        be made any more.
        """
        check_names("Embedder.of()", place, [*PlaceKeywords.__annotations__, "column", "layer"])
        dataset = output if isinstance(output, Dataset) else open_dataset(output)
        layer = dataset.layer_of(layer)
        embedder = cls.__new__(cls)
        options = runtime_options({"runtime": _as_made(dataset), **place})
        embedder._start(_weights_of(dataset), options, str(dataset.layout.root))
        embedder._layer, embedder._column = layer, column
        return embedder

    def _start(self, weights: Weights, options: RuntimeOptions, output: str = "") -> None:
        self.identity, self.dims = weights.identity, weights.dims
        self._layer = weights.identity.last_layer
        job = Job(output=output, share=ALL, sources=(), reads_ahead=0, with_label=False,
                  identity=weights.identity, dims=weights.dims)  # fmt: skip
        placement = place_here(options, weights.identity)
        network = network_for(job, placement, weights.tensors)
        self._worker = Worker(job, placement, network)

    def close(self) -> None:
        """Let its threads go. Without it they go when the embedder does."""
        self._worker.close()

    @overload
    def __call__(self, images: Picturelike | Sequence[Picturelike]) -> NDArray[np.float32]: ...

    @overload
    def __call__(self, images: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...

    def __call__(self, images: Any) -> Any:
        """Embeddings float32 [N, D] of an image or several: paths or addresses, bytes of files,
        images of Pillow's, RGB pixels uint8 [H, W, 3] (or [N, H, W, 3]), mixed as you like.

        An image that Pillow has opened and not decoded yet is taken as its file. All other pixels
        are taken as they are; they give what a PNG of them gives. Raises UsageError for an image
        that gives no embedding.

        A dict is taken for a batch of columns, and comes back with `embedding` float32 [N, D]
        (`embedding_<layer>` each if there are several) and `failure` beside: "" or the reason,
        where there is no embedding and the numbers are NaN.
        """
        if isinstance(images, Mapping):
            return self._with_embeddings(images)
        several = _several(images)
        every, failures = self._embed(several)
        for image, failure in zip(several, failures, strict=True):
            if failure:
                name = str(image) if isinstance(image, str | os.PathLike) else "an image"
                raise no_embedding({name: failure})
        return every[self._layer]

    def attempt(
        self, images: Sequence[Picturelike]
    ) -> tuple[NDArray[np.float32], list[Failure | None]]:
        """The same of a list, with the reason for each image that gives no embedding; then its
        numbers are NaN."""
        every, failures = self._embed(_several(images))
        return every[self._layer], failures

    def _with_embeddings(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._column not in batch:
            raise UsageError(
                f"the batch has no column '{self._column}', it has {', '.join(batch)}: say which "
                "holds the images, as in fn_constructor_kwargs={'column': 'image'}"
            )
        every, failures = self._embed(list(batch[self._column]))
        told = [f"{each.reason}: {each.message}" if each else "" for each in failures]
        columns = {self.identity.columns[layer]: vectors for layer, vectors in every.items()}
        return {**batch, **columns, "failure": np.array(told, np.str_)}

    def _embed(
        self, images: Sequence[Picturelike]
    ) -> tuple[dict[str, NDArray[np.float32]], list[Failure | None]]:
        """By layer, in order."""
        failures: list[Failure | None] = []
        made = [np.empty((0, sum(self.dims.values())), np.float32)]
        for start in range(0, len(images), CHUNK):
            with quiet():
                given = [self._decode(each) for each in images[start : start + CHUNK]]
                decoded = [each.result() for each in given]
            pixels = [each.pixels for each in decoded if isinstance(each, Picture)]
            vectors = np.full((len(decoded), made[0].shape[1]), np.nan, np.float32)
            if pixels:
                with np.errstate(over="ignore"):  # too much for float16 is infinite: a failure
                    stored = self._worker.embed(pixels).astype(self.identity.dtype)
                vectors[[isinstance(each, Picture) for each in decoded]] = stored
            for row, outcome in zip(vectors, decoded, strict=True):
                if isinstance(outcome, Picture) and not np.isfinite(row).all():
                    row[:] = np.nan
                    message = "the model gave a value that is not finite"
                    failures.append(Failure("embed", "non_finite", message))
                else:
                    failures.append(outcome if isinstance(outcome, Failure) else None)
            made.append(vectors)
        bounds = np.cumsum(list(self.dims.values()))[:-1]
        layers = np.split(np.concatenate(made), bounds, axis=1)
        return dict(zip(self.dims, layers, strict=True)), failures

    def _decode(self, image: Picturelike) -> Future[Picture | Failure]:
        """Have a thread decode it."""
        worker, pixels, way = self._worker, self.identity.preprocessing, self.identity.decode
        if isinstance(image, Image.Image) and (data := _file_of(image)):
            image = data
        if isinstance(image, bytes | bytearray):
            return worker.loaders.submit(worker.decode, bytes(image), pixels, way)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                shape = list(image.shape)
                raise UsageError(
                    f"an array of {image.dtype} {shape} is no picture: give uint8 [H, W, 3], RGB"
                )
            image = Image.fromarray(np.ascontiguousarray(image))
        if isinstance(image, Image.Image):
            return worker.loaders.submit(decode_image, image, pixels, way)
        if isinstance(image, str | os.PathLike):
            image = item_of(os.fspath(image))
        if not isinstance(image, Item):
            raise UsageError(
                f"{type(image).__name__} is no picture: give a path, bytes, an image of Pillow's, "
                "or uint8 [H, W, 3]"
            )
        return worker.loaders.submit(self._loaded, image)

    def _loaded(self, item: Item) -> Picture | Failure:
        identity = self.identity
        image = load(item, identity.preprocessing, identity.decode, self._worker.decode)
        return image.picture if isinstance(image, Loaded) else image


def _several(images: Any) -> list[Picturelike]:
    is_one = isinstance(images, str | os.PathLike | bytes | bytearray | Image.Image | Item)
    if is_one or (isinstance(images, np.ndarray) and images.ndim in (2, 3)):
        return [images]
    return list(images)


def _file_of(image: Image.Image) -> bytes | None:
    """The file of an image that Pillow has opened and not decoded: then it can be anything that
    `decode` takes. None for any other, and for one that was turned to a later frame."""
    file = getattr(image, "fp", None)
    if file is None or image.tell():
        return None
    place = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(place)
    return data


def _as_made(dataset: Dataset) -> RuntimeOptions:
    """How the last run of a dataset ran, by its report; as we like where none says."""
    identity = dataset.record.identity
    for report in reversed(dataset.runs()):
        with suppress(OSError, ValueError, KeyError, TypeError):  # it may be anything by now
            engine = json.loads(report.read_bytes())["engine"]
            options = RuntimeOptions(
                runtime=engine["runtime"],
                batch_size=engine["batch_size"],
                gpus_per_worker=None if engine["device"] == "cuda" else 0,
            )
            with suppress(UsageError):  # no such runtime here
                place_here(options, identity)
                return options
    return RuntimeOptions()


def _weights_of(dataset: Dataset) -> Weights:
    """The dataset's weights, found again. Raises ResfeatError if embeddings would be others now."""
    record, layout = dataset.record, dataset.layout
    weights = resolve(FeatureSpec.of(record.identity, record.weights))
    there, now = record.identity.as_dict(), weights.identity.as_dict()
    if there["weights_digest"] != now["weights_digest"]:
        raise ResfeatError(
            f"{layout.root} was made with other weights than {record.weights} are now: bring back "
            "the file that it was made with"
        )
    for name, value in there.items():
        if value != now[name]:
            made_by = record.versions.get("resfeat", "the version that made it")
            raise ResfeatError(
                f"{layout.root} was made with another {name} ({value} there, {now[name]} now): "
                f"search it with resfeat {made_by}, or extract it anew"
            )
    if record.identity.precision == "int8" and not is_intact(layout, record):
        raise ResfeatError(
            f"{layout.quantised} is gone or changed, and queries need the network that the "
            "dataset was made with: bring it back"
        )
    return weights
