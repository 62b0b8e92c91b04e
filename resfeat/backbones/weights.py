"""Weights: what the user asks for becomes tensors, and the identity of their embeddings.

The driver resolves them once, before any worker starts.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resfeat.backbones import Family, Published, build, find, outline, shapes
from resfeat.backbones.checkpoint import is_checkpoint, origin_of, read_tensors, strip
from resfeat.backbones.ours import IMAGENET, LIKE_TORCHVISION
from resfeat.backbones.resnet import ResNet, initialise
from resfeat.errors import ResfeatError, UsageError
from resfeat.spec import FeatureSpec, Identity, Preprocessing


@dataclass(frozen=True)
class Weights:
    """Tensors that fit a backbone exactly, and all that belongs to them."""

    identity: Identity
    dims: Mapping[str, int]  # length of each layer's embedding, in order
    origin: str  # --weights that find them again: "IMAGENET1K_V2", an absolute path, "random:0"
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()  # how the file was read


def resolve(spec: FeatureSpec) -> Weights:
    """Find, read and check what the spec asks for. Raises UsageError for an impossible choice,
    ResfeatError for weights that cannot be read or do not fit."""
    family, name = find(spec.model)
    published = _choose(spec, family, name)
    pixels = published.preprocessing if published else family.default_pixels(name)
    pixels = _overridden(pixels, spec)
    dims, pool = _taps(spec, pixels.crop)
    notes: tuple[str, ...] = ()
    network = outline(spec.model, pixels.crop)
    expected = _deciding(network.state_dict())
    if spec.weights.startswith("random:"):
        origin, tensors = spec.weights, _random(spec, pixels.crop)
    else:
        origin = published.name if published else origin_of(spec.weights)
        read, opened = (published.read(), []) if published else read_tensors(spec.weights)
        read = {network.current(name): tensor for name, tensor in read.items()}
        tensors, prefix, left_out = strip(read, expected, network.head)
        notes = () if published else _notes(origin, opened, prefix, left_out)
    tensors = _fitting(spec.model, origin, tensors, expected)
    identity = Identity(
        model=spec.model,
        weights_digest=digest(tensors),
        preprocessing=pixels,
        decode=spec.decode,
        layers=tuple(dims),
        pool=pool,
        normalize=spec.normalize,
        precision=spec.precision,
        dtype=spec.dtype,
    )
    return Weights(identity, dims, origin, tensors, notes)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values. The file format does not matter."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _choose(spec: FeatureSpec, family: Family, name: str) -> Published | None:
    """The published weights that are named; None for a file or random weights."""
    if spec.weights.startswith("random:"):
        return None
    # Importing torchvision or timm takes seconds, which a file seldom needs.
    if not spec.weights.isidentifier() and is_checkpoint(spec.weights):
        return None
    published = family.published(name)
    why, chosen = f"unknown weights '{spec.weights}'", published.get(spec.weights)
    if spec.weights == "DEFAULT":
        why, chosen = "nobody publishes weights", next(iter(published.values()), None)
    if chosen or is_checkpoint(spec.weights):
        return chosen
    there = f"one of {', '.join(published)}, " if published else ""
    raise UsageError(
        f"{why} for {spec.model}: give {there}the path or address of a .pth or .safetensors file, "
        "or random:SEED"
    )


def _overridden(pixels: Preprocessing, spec: FeatureSpec) -> Preprocessing:
    changes = {"resize": spec.resize, "crop": spec.crop, "interpolation": spec.interpolation}
    pixels = replace(pixels, **{name: value for name, value in changes.items() if value})  # type: ignore[arg-type]
    if pixels.crop > pixels.resize:
        raise UsageError(
            f"a crop of {pixels.crop} pixels is larger than the resize to {pixels.resize}: give "
            f"--resize {pixels.crop} or more, or --crop {pixels.resize} or less"
        )
    return pixels


def _taps(spec: FeatureSpec, crop: int) -> tuple[dict[str, int], str]:
    """The layers in the network's order, each with its embedding's length, and the pooling."""
    given = shapes(spec.model, crop)
    asked = spec.layers or (list(given)[-1],)
    if unknown := [layer for layer in asked if layer not in given]:
        known = ", ".join(given)
        raise UsageError(f"{spec.model} has no layer '{unknown[0]}': give some of {known}")
    taken = {layer: shape for layer, shape in given.items() if layer in asked}
    maps = all(len(shape) == 3 for shape in taken.values())
    if spec.pool and not maps:
        raise UsageError(
            f"{spec.model} pools in its own way: leave out --pool {spec.pool}, or choose one of "
            "resfeat's own models"
        )
    dims = {layer: shape[0] for layer, shape in taken.items()}
    return dims, (spec.pool or "avg") if maps else "own"


def _notes(origin: str, opened: list[str], prefix: str, left_out: list[str]) -> tuple[str, ...]:
    told = [f"took '{'.'.join(opened)}'"] if opened else []
    told += [f"stripped '{prefix}' from the names"] if prefix else []
    told += [f"left out {', '.join(left_out[:5])}"] if left_out else []
    told += [f"and {len(left_out) - 5} more"] if len(left_out) > 5 else []
    return (f"weights {origin}: {', '.join(told)}",) if told else ()


def _random(spec: FeatureSpec, crop: int) -> dict[str, Tensor]:
    seed = spec.weights.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit()) or int(seed) >= 2**63:
        raise UsageError(f"weights '{spec.weights}': give a whole number as seed, as in random:0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))  # for the networks that draw their own
        backbone = build(spec.model, crop)
    if isinstance(backbone, ResNet):
        initialise(backbone, int(seed))
    return backbone.state_dict()


def _fitting(
    model: str, origin: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Exactly the backbone's tensors, in its shapes, all finite; floating point as float32."""
    tensors = _deciding(tensors)
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(wanted.shape)}"
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        fits = _model_of(tensors)
        raise ResfeatError(
            f"weights {origin} do not fit {model}: {', '.join(wrong[:3])}{more}; "
            + (f"give --model {fits}" if fits else "give the --model that they were trained for")
        )
    fitting = {}
    for name, wanted in expected.items():
        tensor, fractions = tensors[name], wanted.is_floating_point()
        # Quantised and packed values mean nothing without their scales.
        unusable = tensor.is_quantized or tensor.is_meta or tensor.is_complex()
        if unusable or tensor.is_floating_point() != fractions:
            raise ResfeatError(
                f"weights {origin}: {name} holds {str(tensor.dtype).removeprefix('torch.')} values"
                f"{' without content' if tensor.is_meta else ''}: save it as "
                f"{'float32' if fractions else 'whole numbers'}"
            )
        if not torch.isfinite(tensor).all():
            raise ResfeatError(f"weights {origin}: {name} has values that are not finite numbers")
        fitting[name] = tensor.to(torch.float32 if fractions else wanted.dtype).contiguous()
    return fitting


def _model_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The network of ours that these tensors fit, if torchvision has it too."""
    given = {name: tensor.shape for name, tensor in tensors.items()}
    for model in LIKE_TORCHVISION:
        expected = _deciding(outline(model, IMAGENET.crop).state_dict())
        if {name: tensor.shape for name, tensor in expected.items()} == given:
            return model
    return None


def _deciding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that decide embeddings: all but counts of training batches, which older
    checkpoints lack."""
    return {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
