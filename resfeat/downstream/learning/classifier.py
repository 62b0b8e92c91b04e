"""A linear classifier of embeddings, saved as a folder:

probe.json      classes, datasets, normalisation and scores, and the digest of the other file
probe.safetensors   `weight` float32 [classes, D] and `bias` float32 [classes]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from resfeat import __version__
from resfeat.downstream.learning.labelled import columns_of
from resfeat.downstream.learning.views import View
from resfeat.downstream.unit import unit
from resfeat.errors import ResfeatError, UsageError, first_line
from resfeat.storage import is_remote, write_json, write_whole

FORMAT = 1
NORMALISATION = "each dataset's vector scaled to a length of 1, then side by side"
ABOUT, TENSORS = "probe.json", "probe.safetensors"


@dataclass(frozen=True)
class Classifier:
    """The logits of vectors x [N, D] are x @ weight.T + bias. The mean and the spread of what it
    learned from are worked into both."""

    views: tuple[View, ...]
    classes: tuple[str, ...]
    weight: NDArray[np.float32]  # [classes, D]
    bias: NDArray[np.float32]  # [classes]

    def share(self, view: int, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """What one view's vectors [N, D], as they are stored, add to the logits [N, classes]."""
        return unit(vectors) @ self.weight[:, columns_of(self.views)[view]].T

    def decide(
        self, shares: Sequence[NDArray[np.float32]]
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The most probable class [N] and its probability [N], of the shares of all views."""
        logits = sum(shares[1:], start=shares[0]) + self.bias
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        best = logits.argmax(axis=1)
        return best, odds.max(axis=1) / odds.sum(axis=1)

    def save(self, folder: str, about: Mapping[str, Any]) -> None:
        """Write the folder, or replace the probe in it. about: what else its JSON is to say."""
        path = check_target(folder)
        tensors = safetensors.numpy.save({"weight": self.weight, "bias": self.bias})
        told = {
            "format": FORMAT,
            "resfeat": __version__,
            "sha256": hashlib.sha256(tensors).hexdigest(),
            "classes": self.classes,
            "datasets": [asdict(view) for view in self.views],
            "normalisation": NORMALISATION,
            **about,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path, path / TENSORS, tensors)
            write_json(path, path / ABOUT, told)
        except OSError as error:
            raise ResfeatError(
                f"cannot write {path}: {first_line(error)}; give another path"
            ) from error

    @classmethod
    def load(cls, folder: str) -> Classifier:
        """Raises UsageError where there is none, ResfeatError for a damaged one."""
        path = Path(folder).absolute()
        if not _has_probe(path):
            raise UsageError(
                f"no probe in {path}: make one with `resfeat probe OUT --save {folder}`"
            )
        try:
            told = json.loads((path / ABOUT).read_bytes())
            if told["format"] != FORMAT:
                raise ResfeatError(
                    f"{path} has format {told['format']}, of resfeat {told['resfeat']}, and this "
                    f"is resfeat {__version__}, which reads format {FORMAT}: use that version, or "
                    "probe anew"
                )
            content = (path / TENSORS).read_bytes()
            if hashlib.sha256(content).hexdigest() != told["sha256"]:
                raise ValueError(f"{TENSORS} is not what {ABOUT} was saved with")
            tensors = safetensors.numpy.load(content)
            views = tuple(View(**each) for each in told["datasets"])
            made = cls(views, tuple(told["classes"]), tensors["weight"], tensors["bias"])
            _check(made)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise ResfeatError(
                f"the probe in {path} is damaged ({reason}): bring it back, or probe anew with "
                "--save"
            ) from error
        return made


def check_target(folder: str) -> Path:
    """The path to save at. Raises UsageError where something else lies there."""
    if not folder or is_remote(folder):
        raise UsageError(f"--save '{folder}': give a folder on a disk")
    path = Path(folder).absolute()
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or _has_probe(path))):
        raise UsageError(f"--save {path}: something else is there, give a new folder")
    return path


def _has_probe(path: Path) -> bool:
    return (path / ABOUT).exists() or (path / TENSORS).exists()


def _check(made: Classifier) -> None:
    """Raise ValueError where its parts do not fit together."""
    shape = len(made.classes), sum(view.dims for view in made.views)
    if not made.views or len(made.classes) < 2 or not all(isinstance(c, str) for c in made.classes):
        raise ValueError("it lacks datasets or classes")
    if made.weight.shape != shape or made.bias.shape != shape[:1]:
        raise ValueError(f"its weight is of {made.weight.shape} and should be of {shape}")
    if not (np.isfinite(made.weight).all() and np.isfinite(made.bias).all()):
        raise ValueError("its weights are not all numbers")
