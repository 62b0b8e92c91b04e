"""From pixels to embeddings as one torch module. Every runtime runs or converts it."""

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resfeat.backbones import build, outline
from resfeat.backbones.backbone import Backbone
from resfeat.backbones.pooling import pool
from resfeat.backbones.resnet import ResNet
from resfeat.spec import Identity


class Embedder(nn.Module):
    """Normalise, run the network, pool each layer, and put the layers side by side.

    In our own networks batch norm is folded into the convolutions: that changes embeddings by about
    3e-7 relative and saves a pass over every feature map. The network runs in its parameters' type,
    everything else in float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, identity: Identity, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = _load(identity, tensors)
        self.identity = identity
        for name in ("mean", "std"):
            values = torch.tensor(getattr(identity.preprocessing, name))
            self.register_buffer(name, values.view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings float32 [N, D] of RGB pixels uint8 [N, H, W, 3]."""
        pictures = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        layers = self.identity.layers
        outputs = self.network(pictures.to(next(self.network.parameters()).dtype), layers)
        vectors = [pool(outputs[name], self.identity.pool) for name in layers]
        if self.identity.normalize:
            vectors = [nn.functional.normalize(each, dim=1) for each in vectors]  # L2
        return torch.cat(vectors, dim=1)


def _load(identity: Identity, tensors: Mapping[str, Tensor]) -> Backbone:
    model, crop = identity.model, identity.preprocessing.crop
    network = outline(model, crop)
    # Not strict, since the counts of training batches are missing. weights.py checked the rest.
    if isinstance(network, ResNet):
        network = copy.deepcopy(network)  # cheap: it has no values yet
        network.load_state_dict(tensors, strict=False, assign=True)
        fold_batch_norm(network)
    else:  # others may compute values of their own, and order their layers otherwise
        network = build(model, crop)
        network.load_state_dict(tensors, strict=False)
    return network.eval()


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution that is registered right before it; in place, for
    eval mode only."""
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (behind, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, behind, nn.Identity())
    return model
