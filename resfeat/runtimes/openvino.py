"""The OpenVINO runtime, on x86-64 CPUs: the fastest there, and the only one with int8."""

import io
import logging
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# OpenVINO and NNCF report their use to their maker through this module. Without it they are quiet.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino

from resfeat.backbones.resnet import ResNet
from resfeat.errors import ResfeatError, first_line
from resfeat.runtimes.embedder import Embedder
from resfeat.runtimes.graph import graph_of
from resfeat.spec import Identity
from resfeat.storage import Location

Arrays = Mapping[str, NDArray[Any]]


class OpenVINORuntime:
    """A network, as `convert` or `load` gave it, compiled for so many threads and one batch size.
    Each thread runs one batch on one core, so the bits do not depend on the number of threads."""

    steady = True

    def __init__(self, identity: Identity, network: Arrays, threads: int, batch_size: int) -> None:
        if identity.precision == "bf16" and not has_bf16():  # on this node of a cluster
            raise ResfeatError(
                f"{platform.node()} has no bf16 instructions: give --precision fp32 or int8"
            )
        core = openvino.Core()
        model = core.read_model(network["xml"].tobytes(), openvino.Tensor(network["bin"]))
        crop = identity.preprocessing.crop
        model.reshape([batch_size, crop, crop, 3])
        settings = {
            # Also of the layers that int8 leaves as they are.
            "INFERENCE_PRECISION_HINT": "bf16" if identity.precision == "bf16" else "f32",
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            # Several workers on one machine would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = core.compile_model(model, "CPU", settings)
        self._own = threading.local()

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return np.zeros(shape, np.uint8)

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 [N, D] of RGB pixels uint8 [N, H, W, 3]. N is the batch size."""
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        # `infer` does the same, with twice as much Python around it.
        request = self._own.request
        request.set_input_tensor(openvino.Tensor(pixels, shared_memory=True))
        request.start_async()
        request.wait()
        result: NDArray[np.float32] = request.get_output_tensor().data.copy()
        return result


def has_bf16() -> bool:
    """Whether this CPU computes in bf16; OpenVINO would quietly take fp32 otherwise."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def convert(identity: Identity, tensors: Mapping[str, Tensor]) -> Arrays:
    """The network in OpenVINO's form. Raises ResfeatError if OpenVINO cannot convert it."""
    with TemporaryDirectory(prefix="resfeat-") as folder:
        path = Path(folder, "network.xml")
        embedder = Embedder(identity, tensors).eval()
        if isinstance(embedder.network, ResNet):
            with torch.inference_mode():
                model = graph_of(embedder)
        else:
            model = _traced(embedder)
        openvino.save_model(model, path, compress_to_fp16=False)
        return load(path)


def load(path: Location) -> Arrays:
    """A network that was saved at `path` (.xml, and .bin beside it)."""
    return {
        "xml": np.frombuffer(path.read_bytes(), np.uint8),
        "bin": np.frombuffer(path.with_suffix(".bin").read_bytes(), np.uint8),
    }


def quantise(
    identity: Identity,
    tensors: Mapping[str, Tensor],
    pictures: Callable[[], Sequence[NDArray[np.uint8]]],
    network: Path,
    on_picture: Callable[[int, int], None] = lambda used, wanted: None,
) -> None:
    """Write an int8 network to `network` (.xml, and .bin beside it). Its ranges are calibrated on
    pictures, uint8 [H, W, 3] each. pictures: gives them; it is called once the network is traced.
    on_picture: is told before each how many have been used, and how many will be; it may raise."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA
    import nncf

    nncf.set_log_level(logging.ERROR)
    model = _traced(Embedder(identity, tensors).eval())
    chosen = pictures()

    def batches() -> Iterator[NDArray[np.uint8]]:
        for used, picture in enumerate(chosen):
            on_picture(used, len(chosen))
            yield picture[None]

    with redirect_stdout(io.StringIO()):  # NNCF draws bars
        quantised = nncf.quantize(
            model,
            nncf.Dataset(batches()),
            subset_size=len(chosen),
            preset=nncf.QuantizationPreset.MIXED,
        )
    openvino.save_model(quantised, network, compress_to_fp16=False)


def _traced(embedder: Embedder) -> openvino.Model:
    crop = embedder.identity.preprocessing.crop
    example = torch.zeros(1, crop, crop, 3, dtype=torch.uint8)
    try:
        # OpenVINO prints more if our own command line has a --verbose.
        with torch.inference_mode(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(embedder, example, check_trace=False)  # type: ignore[no-untyped-call]
            return openvino.convert_model(traced, example_input=example)
    # Tracing and conversion fail in many ways, none of which the user can mend.
    except Exception as error:
        raise ResfeatError(
            f"OpenVINO cannot run {embedder.identity.model} ({first_line(error)}): "
            "give --runtime torch"
        ) from error
