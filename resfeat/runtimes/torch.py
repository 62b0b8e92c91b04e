"""The torch runtime, on a CPU or a CUDA device."""

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat.runtimes.embedder import Embedder
from resfeat.spec import Identity

_setting_threads = threading.Lock()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """An `Embedder` on `device`. On a GPU each calling thread has a stream of its own, so that the
    copies of one batch run while another is computed."""

    def __init__(self, identity: Identity, tensors: Mapping[str, Tensor], device: str) -> None:
        if device == "cuda":
            # fp32 means fp32, and the same bits every time.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        self._device = torch.device(device)
        self._embedder = Embedder(identity, tensors).to(self._device)
        self._embedder.network.to(DTYPES[identity.precision], memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device == "cuda":  # the threads' own streams do not wait for these copies
            torch.cuda.synchronize()
        self._own = threading.local()

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Zeros, in memory that a GPU can copy from by itself."""
        zeros = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return zeros.numpy()

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 [N, D] of RGB pixels uint8 [N, H, W, 3]."""
        with torch.inference_mode(), self._stream():
            batch = torch.from_numpy(pixels).to(self._device, non_blocking=True)
            return self._embedder(batch).cpu().numpy()  # type: ignore[no-any-return]

    def _stream(self) -> Any:
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._own.stream)


def use_one_core() -> None:
    """Have torch use one core in the calling thread, and as many as before in all others."""
    with _setting_threads:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is also the number for threads that first use torch later: another one sets it back.
        restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
        restoring.start()
        restoring.join()
