"""How well embeddings tell classes apart: k-NN and logistic regression on held-out images.

An extra: `resfeat[probe]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
from numpy.typing import NDArray

from resfeat.downstream.learning.classifier import Classifier
from resfeat.downstream.learning.labelled import Labelled
from resfeat.errors import UsageError, missing

try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import ThreadpoolController
except ImportError as error:
    raise missing("a probe", "scikit-learn", "probe") from error

SHOTS = (1, 5, 10)  # images of each class to learn from, for the few-shot curve
DRAWS = 3  # of those, in each split: one image a class is a matter of luck
# What is left to gain after so many steps of L-BFGS is nothing that held-out images notice.
MOST_STEPS = 1000
# The least values for which several threads are worth it. With fewer they mostly wait for each
# other: on a busy machine that took ten times as long.
THREADED = 2**22
LIBRARIES = ThreadpoolController()
# Dimensions are scaled by their own spread and this share of that of all: by their own alone, those
# that are nearly always 0 in a trained network would become as loud as the others.
DAMPED = 0.5
TOP = 5
TOGETHER = "together"

Rows = NDArray[np.intp]
Matrix = NDArray[np.float32]
Split = tuple[Rows, Rows]  # the rows to learn from, and those to be tested with
Fit = Callable[
    [Matrix, Rows, Matrix], Matrix
]  # from what is learned and tested to votes [N, classes]


@dataclass(frozen=True)
class Method:
    """How to measure. folds: each image is tested once, by what was learned from the other folds.
    test: without folds, the share (0 to 1) of images to be tested. k: of k-NN."""

    folds: int | None = None
    test: float = 0.2
    k: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """embeddings: the path of a dataset, with its layer where it has several, or "together". top1:
    share of tested images whose class was the first guess, and its spread over the folds. top5:
    among the first five; None for five classes or less. few_shot: top1 by how many images of each
    class were learned from."""

    embeddings: str
    dims: int
    classifier: str
    top1: float
    spread: float | None
    top5: float | None
    few_shot: Mapping[int, float]


@dataclass(frozen=True)
class Measured:
    """confusion: int [classes, classes], how many images of a class (row) were taken for a class
    (column) by the logistic regression on all datasets together."""

    scores: Sequence[Score]
    confusion: NDArray[np.int64]
    tested: int

    def most_confused(self, most: int) -> list[tuple[int, int, int]]:
        """Class, the class that it was taken for, and how often: those with the most, if any."""
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [(int(a), int(b), int(wrong[a, b])) for a, b in pairs if wrong[a, b]]


def measure(data: Labelled, method: Method, on_step: Callable[[str], object]) -> Measured:
    """Try k-NN and logistic regression on each dataset alone, and on several together, with the
    same images each time. on_step is told what comes next."""
    splits, count = _splits(data, method), len(data.classes)
    classifiers: dict[str, Fit] = {
        f"k-NN ({method.k})": partial(_nearest, count=count, k=method.k),
        "logistic regression": partial(_linear, count=count),
    }
    sizes = [shots for shots in SHOTS if shots < np.bincount(data.which).max()]
    scores = []
    for name, vectors in _choices(data):
        for classifier, fit in classifiers.items():
            on_step(f"probing {name} by {classifier}")
            guesses = list(_guesses(fit, vectors, data.which, splits))
            few = {}
            for shots in sizes:
                some = _few(data.which, splits, shots, method.seed)
                tried = _guesses(fit, vectors, data.which, some)
                few[shots] = float(np.mean([_top1(*each) for each in tried]))
            scores.append(_score((name, vectors.shape[1], classifier), guesses, few))
    confusion = np.zeros((count, count), np.int64)
    for true, votes in guesses:  # the last ones
        np.add.at(confusion, (true, votes.argmax(axis=1)), 1)
    return Measured(scores, confusion, int(confusion.sum()))


def learn(data: Labelled) -> Classifier:
    """Logistic regression on all images and all datasets together."""
    with _threads(data.vectors):
        weight, bias = _weights(data.vectors, data.which, len(data.classes))
    return Classifier(data.views, data.classes, weight, bias)


def _choices(data: Labelled) -> Iterator[tuple[str, Matrix]]:
    for place, view in enumerate(data.views):
        yield view.name, data.of(place)
    if len(data.views) > 1:
        yield TOGETHER, data.vectors


def _splits(data: Labelled, method: Method) -> list[Split]:
    """Each with about the same share of every class. Raises UsageError for more than there is."""
    sizes, images, count = np.bincount(data.which), len(data.which), len(data.classes)
    if method.folds and method.folds > sizes.max():
        raise UsageError(
            f"--folds {method.folds}: the largest class, '{data.classes[sizes.argmax()]}', has "
            f"{sizes.max()} images: give at most {sizes.max()}"
        )
    tested = ceil(images * method.test)
    if not method.folds and not count <= tested <= images - count:
        raise UsageError(
            f"--test {method.test:g} of {images:,} images is {tested:,}, and of the {count:,} "
            "classes each needs one to be tested and one to learn from: give --folds 2"
        )
    splitter = (
        StratifiedKFold(method.folds, shuffle=True, random_state=method.seed)
        if method.folds
        else StratifiedShuffleSplit(1, test_size=tested, random_state=method.seed)
    )
    with warnings.catch_warnings():  # of small classes, which are in some folds only: that is fine
        warnings.simplefilter("ignore")
        splits = list(splitter.split(data.which, data.which))
    if any(len(np.unique(data.which[train])) < 2 for train, _ in splits):
        raise UsageError("images of one class alone are left to learn from: give less --test")
    return splits


def _few(which: Rows, splits: Sequence[Split], shots: int, seed: int) -> Iterator[Split]:
    """The splits with so many images of each class to learn from, or all it has; some draws each.
    The same ones for whatever is compared."""
    for number, (train, test) in enumerate(splits):
        for draw in range(DRAWS):
            mixed = np.random.default_rng([seed, number, shots, draw]).permutation(train)
            members = (mixed[which[mixed] == each][:shots] for each in np.unique(which[train]))
            yield np.concatenate(list(members)), test


def _guesses(
    fit: Fit, vectors: Matrix, which: Rows, splits: Iterable[Split]
) -> Iterator[tuple[Rows, Matrix]]:
    """Of each split what the tested images are, and the votes on them."""
    for train, test in splits:
        learned = vectors[train]
        with _threads(learned):
            votes = fit(learned, which[train], vectors[test])
        yield which[test], votes


def _threads(vectors: Matrix) -> AbstractContextManager[object]:
    """As many as are worth it: see THREADED."""
    limit: AbstractContextManager[object] = LIBRARIES.limit(
        limits=None if vectors.size >= THREADED else 1
    )
    return limit


def _nearest(vectors: Matrix, which: Rows, tested: Matrix, *, count: int, k: int) -> Matrix:
    """The votes [N, count] of the k nearest by cosine, of whom the nearer ones count more."""
    model = KNeighborsClassifier(min(k, len(vectors)), metric="cosine", weights="distance")
    votes = np.zeros((len(tested), count), np.float32)
    with warnings.catch_warnings():  # of classes with hardly an image each, which is no news
        warnings.simplefilter("ignore")
        model.fit(vectors, which)
    votes[:, model.classes_] = model.predict_proba(tested)
    return votes


def _linear(vectors: Matrix, which: Rows, tested: Matrix, *, count: int) -> Matrix:
    """The logits [N, count] of a logistic regression."""
    weight, bias = _weights(vectors, which, count)
    return tested @ weight.T + bias


def _weights(vectors: Matrix, which: Rows, count: int) -> tuple[Matrix, Matrix]:
    """Weight [count, D] and bias [count] of a logistic regression on dimensions that were given a
    mean of 0 and about the same spread, for vectors as they are. A class without images is never
    the best."""
    mean, spread = vectors.mean(axis=0), vectors.std(axis=0)
    spread += DAMPED * np.sqrt((spread**2).mean()) or 1  # 1: all vectors are the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(max_iter=MOST_STEPS).fit((vectors - mean) / spread, which)
    slopes, starts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn has the odds of the second against the first
        slopes, starts = np.vstack([-slopes, slopes]) / 2, np.hstack([-starts, starts]) / 2
    slopes = slopes.astype(np.float64) / spread
    weight = np.zeros((count, vectors.shape[1]), np.float32)
    bias = np.full(count, -np.inf, np.float32)
    weight[model.classes_], bias[model.classes_] = slopes, starts - slopes @ mean
    return weight, bias


def _score(
    about: tuple[str, int, str], guesses: Sequence[tuple[Rows, Matrix]], few: Mapping[int, float]
) -> Score:
    """about: the first fields of a Score. guesses: of each split."""
    true, votes = (np.concatenate(each) for each in zip(*guesses, strict=True))
    spread = float(np.std([_top1(*each) for each in guesses])) if len(guesses) > 1 else None
    top5 = _top(true, votes, TOP) if votes.shape[1] > TOP else None
    return Score(*about, _top1(true, votes), spread, top5, few)


def _top1(true: Rows, votes: Matrix) -> float:
    return float((votes.argmax(axis=1) == true).mean())


def _top(true: Rows, votes: Matrix, most: int) -> float:
    """The share whose class is among so many of the best. A class that has no better a vote than
    others, such as none at all, is not among them by its place in the list."""
    own = np.take_along_axis(votes, true[:, None], axis=1)
    return float(((votes >= own).sum(axis=1) <= most).mean())
