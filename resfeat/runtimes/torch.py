"""The torch runtime, on a CPU or a CUDA device."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resfeat.backbones import build
from resfeat.backbones.pooling import normalise, pool
from resfeat.backbones.resnet import ResNet
from resfeat.spec import Identity

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """A backbone in eval mode on `device`, with batch norm folded and channels last.

    Folding changes embeddings by about 3e-7 relative and saves a pass over every feature map. The
    network runs in the identity's precision; normalisation before it and pooling behind it do so
    in float32.
    """

    def __init__(self, identity: Identity, tensors: dict[str, Tensor], device: str) -> None:
        if device == "cuda":
            # fp32 means fp32, and the same bits every time.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        model = build(identity.model, identity.preprocessing.crop)
        # Strict but for the counts of training batches: weights.py has checked the rest by name.
        model.load_state_dict(tensors, strict=False)
        if isinstance(model, ResNet):  # other networks may order their layers otherwise
            fold_batch_norm(model)
        self.device = torch.device(device)
        self._dtype = DTYPES[identity.precision]
        self._identity = identity
        self._model = model.to(self.device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = identity.preprocessing.mean, identity.preprocessing.std
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of RGB pixels uint8 [N, H, W, 3]: float32 [N, D], the layers side by side."""
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
            normalised = batch.float().div_(255).sub_(self._mean).div_(self._std)
            outputs = self._model(normalised.to(self._dtype), self._identity.layers)
            vectors = [pool(outputs[name], self._identity.pool) for name in self._identity.layers]
            if self._identity.normalize:
                vectors = [normalise(each) for each in vectors]
            result: NDArray[np.float32] = torch.cat(vectors, dim=1).cpu().numpy()
            return result


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution that feeds it; in place, for eval mode only.

    Relies on each batch norm being registered right behind its convolution.
    """
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (behind, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, behind, nn.Identity())
    return model
