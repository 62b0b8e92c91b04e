"""The torch runtime. On a GPU, `cuda.py` makes it faster."""

import threading
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resfeat.runtimes.embedder import Embedder
from resfeat.spec import Identity

_setting_threads = threading.Lock()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """An `Embedder` on `device`, "cpu" or "cuda"."""

    steady = True

    def __init__(self, identity: Identity, tensors: Mapping[str, Tensor], device: str) -> None:
        if device == "cuda":
            # fp32 means fp32, and the same bits every time.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        self._device = torch.device(device)
        self._embedder = Embedder(identity, tensors).to(self._device)
        self._embedder.network.to(DTYPES[identity.precision], memory_format=torch.channels_last)  # type: ignore[call-overload]

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return np.zeros(shape, np.uint8)

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 [N, D] of RGB pixels uint8 [N, H, W, 3]."""
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).to(self._device)
            return self._embedder(batch).cpu().numpy()  # type: ignore[no-any-return]


def use_one_core() -> None:
    """Have torch use one core in the calling thread, and as many as before in all others."""
    with _setting_threads:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is also the number for threads that first use torch later: another one sets it back.
        restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
        restoring.start()
        restoring.join()
