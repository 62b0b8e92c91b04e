"""One model on one device: pixels in, embeddings out; and which runtime runs where.

The driver prepares a network once, where the weights are; each worker starts it. A started runtime
has two methods, which several threads may call at once, and tells one thing:

    empty(shape)   zeros uint8, to put a batch together in
    embed(pixels)  uint8 [N, H, W, 3] to float32 [N, D], the layers side by side
    steady         whether an image has, so far, had the same bits at any place of a batch

A runtime's module is only imported where it is used.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from resfeat.errors import UsageError, missing
from resfeat.spec import Identity, Precision, RuntimeName, RuntimeOptions

if TYPE_CHECKING:
    from torch import Tensor

    from resfeat.runtimes.openvino import OpenVINORuntime
    from resfeat.runtimes.torch import TorchRuntime
    from resfeat.storage import Location

# What every embedding is checked against: torch in this precision, on a CPU.
REFERENCE: Precision = "fp32"
OFFERED: Mapping[RuntimeName, tuple[Precision, ...]] = {
    "torch": ("fp32", "bf16", "fp16"),
    "openvino": ("fp32", "bf16", "int8"),
}

# Images that a GPU is given at a time, whatever the batch size: with another number cuDNN may take
# other kernels, which give other bits.
GPU_BATCH = 256
# Images in a batch. A CPU's core is fastest while feature maps stay in its cache.
BATCH_SIZE = {("torch", "cpu"): 16, ("openvino", "cpu"): 2, ("torch", "cuda"): GPU_BATCH}
X86 = ("x86_64", "AMD64")


@dataclass(frozen=True)
class Network:
    """A network as its runtime takes it. It travels to the workers."""

    runtime: RuntimeName
    identity: Identity
    arrays: Mapping[str, NDArray[Any]]


def keeps_to_the_cpu(options: RuntimeOptions, precision: Precision) -> bool:
    """Whether no GPU is wanted, or the user did not say and asked for what only CPUs have."""
    if options.gpus_per_worker is None:
        return options.runtime == "openvino" or precision == "int8"
    return options.gpus_per_worker == 0


def check(options: RuntimeOptions, model: str, precision: Precision) -> None:
    """Raise UsageError, before any work is done, for what this machine cannot have."""
    if options.gpus_per_worker or options.runtime or precision == "int8":
        choose(options.runtime, model, precision, "cuda" if options.gpus_per_worker else "cpu")
    if precision == "int8" and importlib.util.find_spec("nncf") is None:
        raise missing("--precision int8", "nncf", "int8")


def choose(asked: RuntimeName | None, model: str, precision: Precision, device: str) -> RuntimeName:
    """The runtime that is asked for, or else the fastest that is known to be right. Raises
    UsageError if this machine has none for it."""
    installed, offered = importlib.util.find_spec("openvino") is not None, OFFERED["openvino"]
    if asked != "openvino" and precision != "int8":
        # OpenVINO is not tested with other libraries' networks and CPUs: users must ask for it.
        tested = device == "cpu" and ":" not in model and platform.machine() in X86
        if asked == "torch" or not (installed and tested and precision in offered):
            return "torch"
        return "torch" if precision == "bf16" and not _has_bf16() else "openvino"
    what = "--runtime openvino" if asked == "openvino" else "--precision int8"
    if device == "cuda":
        raise UsageError(
            f"{what} is for CPUs, and this run would be on a GPU: give --gpus-per-worker 0, or "
            f"leave out {what}"
        )
    if precision not in offered:
        raise UsageError(
            f"--runtime openvino has no {precision}: give --precision {' or '.join(offered)}, or "
            "--runtime torch"
        )
    if asked == "torch":
        raise UsageError("--runtime torch has no int8: give --runtime openvino, or auto")
    if not installed:
        raise missing(what, "openvino", "int8")
    if precision == "bf16" and not _has_bf16():
        raise UsageError(
            "--runtime openvino --precision bf16 needs a CPU with bf16 instructions, and this "
            "one has none: give --precision fp32 or int8"
        )
    return "openvino"


def _has_bf16() -> bool:
    from resfeat.runtimes.openvino import has_bf16

    return has_bf16()


def prepare(
    name: RuntimeName, identity: Identity, tensors: Mapping[str, Tensor], quantised: Location
) -> Network:
    """The network as this runtime takes it. quantised: where a dataset's int8 network lies."""
    if name == "torch":
        return Network(name, identity, {key: tensor.numpy() for key, tensor in tensors.items()})
    from resfeat.runtimes.openvino import convert, load

    is_int8 = identity.precision == "int8"
    return Network(name, identity, load(quantised) if is_int8 else convert(identity, tensors))


def start(
    network: Network, *, device: str, threads: int, batch_size: int, share: float = 1.0
) -> TorchRuntime | OpenVINORuntime:
    """Build the model. threads: how many will call it. share: of a GPU's memory, up to 1."""
    if network.runtime == "torch":
        import torch

        # Copies, since arrays from Ray's object store are read-only and shared.
        tensors = {key: torch.from_numpy(array.copy()) for key, array in network.arrays.items()}
        if device == "cuda":
            from resfeat.runtimes.cuda import CudaRuntime

            return CudaRuntime(network.identity, tensors, share)
        from resfeat.runtimes.torch import TorchRuntime

        return TorchRuntime(network.identity, tensors, device)
    from resfeat.runtimes.openvino import OpenVINORuntime

    return OpenVINORuntime(network.identity, network.arrays, threads, batch_size)
