"""From a feature map to a vector."""

from torch import Tensor

# Generalised mean of Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human
# Annotation", 2018, eq. 3, with the exponent that its authors begin with.
GEM_POWER = 3.0
GEM_FLOOR = 1e-6


def pool(features: Tensor, how: str) -> Tensor:
    """A feature map [N, C, h, w] as float32 [N, C] by "avg", "max" or "gem"; or vectors as such."""
    features = features.float()
    if features.dim() == 2:
        return features
    if how == "max":
        return features.amax(dim=(2, 3))
    if how == "gem":
        powers = features.clamp(min=GEM_FLOOR).pow(GEM_POWER)
        return powers.mean(dim=(2, 3)).pow(1 / GEM_POWER)
    return features.mean(dim=(2, 3))
