"""Predictions: confusion, per-class accuracy, calibration, by hand and by scikit-learn; guards."""

import re

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from ctune.evaluate.classification import (
    Predictions,
    balanced_accuracy,
    classification_scores,
    confusion_matrix,
    expected_calibration_error,
    per_class_accuracy,
)

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, 4, (200,), generator=GENERATOR)
LOGITS = 2 * torch.eye(5)[LABELS] + torch.randn(200, 5, generator=GENERATOR)
SAID = Predictions(LABELS, LOGITS)


def sure(labels: list[int], probabilities: list[list[float]]) -> Predictions:
    return Predictions(torch.tensor(labels), torch.tensor(probabilities, dtype=torch.float64).log())


def test_equals_scikit_learn() -> None:
    y, predicted = LABELS.numpy(), SAID.classes.numpy()
    expected = metrics.confusion_matrix(y, predicted, labels=range(5))
    assert confusion_matrix(SAID).tolist() == expected.tolist()
    recalls = metrics.recall_score(y, predicted, labels=range(4), average=None)
    *accuracies, absent = per_class_accuracy(SAID)
    assert accuracies == pytest.approx(recalls.tolist())
    assert absent is None
    assert balanced_accuracy(SAID) == pytest.approx(np.mean(recalls))


def test_equal_logits_are_the_lowest_class() -> None:
    said = Predictions(torch.tensor([0, 1]), torch.tensor([[2.0, 2, 2], [0, 3, 3]]))
    assert said.classes.tolist() == [0, 1]
    torch.testing.assert_close(said.probabilities.sum(1), torch.ones(2).double())
    assert said.accuracy == 1


def test_calibration_error_by_hand() -> None:
    # Bins of 0.5: one sample of confidence 0.5 that is wrong, three of 0.8, 0.8 and 0.9, one wrong.
    said = sure([0, 0, 0, 1], [[0.5, 0.5], [0.8, 0.2], [0.9, 0.1], [0.8, 0.2]])
    swapped = Predictions(1 - said.labels, said.logits)
    first = abs(1 - 0.5) / 4
    second = abs(2 - 2.5) / 4
    assert expected_calibration_error(said, num_bins=2) == pytest.approx(first + second)
    assert expected_calibration_error(swapped, num_bins=2) == pytest.approx(0.5 / 4 + 1.5 / 4)
    assert expected_calibration_error(said, num_bins=1) == pytest.approx(abs(3 - 3) / 4)


def test_edges_of_bins_belong_to_the_bin_below() -> None:
    said = sure([1, 0], [[0.5, 0.5], [0.75, 0.25]])
    both = (0.5 + 0.25) / 2
    assert expected_calibration_error(said, num_bins=2) == pytest.approx(both)
    assert expected_calibration_error(said, num_bins=4) == pytest.approx(both)


@pytest.mark.parametrize(("labels", "error"), [([0, 0], 0.0), ([1, 1], 1.0)])
def test_a_classifier_that_is_always_sure(labels: list[int], error: float) -> None:
    logits = torch.tensor([[1000.0, 0], [1000, 0]])
    said = Predictions(torch.tensor(labels), logits)
    assert expected_calibration_error(said) == error


def test_scores_of_a_class_that_is_never_recognised() -> None:
    logits = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    scores = classification_scores(Predictions(torch.tensor([0, 0, 0, 1]), logits))
    assert scores["top1"] == 0.75
    assert scores["balanced_accuracy"] == 0.5
    assert scores["worst_class_accuracy"] == 0
    assert scores["top5"] == 1


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        (LABELS, LOGITS[0], "must be [M, C]"),
        (LABELS[:0], LOGITS[:0], "must be [M, C]"),
        (LABELS, LOGITS * torch.nan, "non-finite"),
        (LABELS[:3], LOGITS, "must hold 200 integers"),
        (LABELS + 2, LOGITS, "num_classes is 5"),
    ],
)
def test_refuses(labels: Tensor, logits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Predictions(labels, logits)


def test_refuses_no_bins() -> None:
    with pytest.raises(ValueError, match="num_bins is 0"):
        expected_calibration_error(SAID, num_bins=0)
