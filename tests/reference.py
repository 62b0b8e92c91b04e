"""The independent reference: torchvision's model and transforms on Pillow's pixels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from later import Later
from numpy.typing import NDArray
from PIL import Image

models = Later("torchvision.models")


def torchvision_model(name: str, seed: int) -> torch.nn.Module:
    """torchvision's network with random weights and batch norms that do something."""
    torch.manual_seed(seed)
    model = models.get_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def reference_embeddings(
    name: str, checkpoint: Path, images: Iterable[Path], **pixels: int
) -> NDArray[np.float32]:
    """Embeddings [N, D], as a careful user would compute them without resfeat.

    pixels: `resize_size` and `crop_size`, if not those of the published weights.
    """
    model = models.get_model(name)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    model.fc = torch.nn.Identity()
    model.eval()
    transforms = models.get_model_weights(name).DEFAULT.transforms(**pixels)
    embeddings = []
    with torch.inference_mode():
        for path in images:
            with Image.open(path) as image:
                embeddings.append(model(transforms(image.convert("RGB"))[None])[0].numpy())
    return np.stack(embeddings)
