"""Quality of class predictions beyond accuracy: per class, balanced, calibrated.

Letters: M samples, C classes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ctune.evaluate.accuracy import first_largest, topk_accuracy
from ctune.evaluate.inputs import check_labels
from ctune.schema import JsonObject


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of labelled images: labels [M] int64 and logits [M, C].

    Raises:
        ValueError: logits not finite [M, C], empty; labels not [M] integers in [0, C).
    """

    labels: Tensor
    logits: Tensor

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or 0 in self.logits.shape:
            raise ValueError(f"logits has shape {list(self.logits.shape)}; it must be [M, C]")
        if not bool(torch.isfinite(self.logits).all()):
            raise ValueError("logits holds a non-finite value; the model has diverged")
        check_labels(self.labels, len(self.logits), num_classes=self.logits.shape[1])

    @cached_property
    def probabilities(self) -> Tensor:
        """[M, C] float64, softmax of the logits."""
        return self.logits.detach().double().softmax(1)

    @cached_property
    def classes(self) -> Tensor:
        """[M] int64: the largest logit, the lowest class among equal ones."""
        return first_largest(self.logits)

    @property
    def accuracy(self) -> float:
        """Share of labels that are predicted."""
        return int((self.classes == self.labels.to(self.classes)).sum()) / len(self.labels)


def confusion_matrix(predictions: Predictions) -> Tensor:
    """Counts [C, C] int64 of samples by (true, predicted) class."""
    C = predictions.logits.shape[1]
    pairs = predictions.labels.to(predictions.classes) * C + predictions.classes
    return torch.bincount(pairs, minlength=C * C).view(C, C)


def per_class_accuracy(predictions: Predictions) -> list[float | None]:
    """Share of each class's samples that are recognised (its recall), None without samples; [C]."""
    C = predictions.logits.shape[1]
    labels = predictions.labels.to(predictions.classes)
    right = torch.bincount(labels[labels == predictions.classes], minlength=C).tolist()
    sizes = torch.bincount(labels, minlength=C).tolist()
    return [hits / size if size else None for hits, size in zip(right, sizes, strict=True)]


def balanced_accuracy(predictions: Predictions) -> float:
    """Mean of the per-class accuracies over the classes that have samples."""
    accuracies = [share for share in per_class_accuracy(predictions) if share is not None]
    return sum(accuracies) / len(accuracies)


def expected_calibration_error(predictions: Predictions, *, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy: 0 for a classifier that knows how sure it is.

    Samples are sorted by confidence, the probability of the predicted class, into equal bins of
    (0, 1], each closed on the right; ECE = sum over bins of (size / M) times the absolute
    difference of the bin's accuracy and mean confidence.
    Source: Guo et al. 2017, arXiv 1706.04599, Eq. 3, with 15 bins.

    Raises:
        ValueError: num_bins < 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1, 15 is usual")
    confidence = predictions.probabilities.gather(1, predictions.classes[:, None])[:, 0]
    right = (predictions.classes == predictions.labels.to(predictions.classes)).double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])
    gaps = confidence.new_zeros(num_bins).index_add_(0, bins, right - confidence)
    return float(gaps.abs().sum()) / len(confidence)


def classification_scores(predictions: Predictions, *, num_bins: int = 15) -> JsonObject:
    """Return top-1, top-5, balanced and worst class accuracy, and the calibration error."""
    C = predictions.logits.shape[1]
    labels = predictions.labels.to(predictions.logits.device)
    top1, top5 = topk_accuracy(predictions.logits, labels, (1, min(5, C)))
    accuracies = [share for share in per_class_accuracy(predictions) if share is not None]
    return {
        "top1": top1,
        "top5": top5,
        "balanced_accuracy": balanced_accuracy(predictions),
        "worst_class_accuracy": min(accuracies),
        "calibration_error": expected_calibration_error(predictions, num_bins=num_bins),
    }
