"""What embeddings tell of labels: learned, saved and applied.

`probe.py` takes scikit-learn with it, and is imported where it runs: what it saved is applied
without.
"""

from resfeat.downstream.learning.classifier import Classifier, check_target
from resfeat.downstream.learning.confusion import confusion_picture
from resfeat.downstream.learning.labelled import (
    Labelled,
    LeftOut,
    gather,
    in_order,
    labels_of,
    labels_of_file,
)
from resfeat.downstream.learning.predict import Predictions, open_targets, write_predictions
from resfeat.downstream.learning.views import View, open_views

__all__ = [
    "Classifier", "Labelled", "LeftOut", "Predictions", "View", "check_target",
    "confusion_picture", "gather", "in_order", "labels_of", "labels_of_file", "open_targets",
    "open_views", "write_predictions",
]  # fmt: skip
