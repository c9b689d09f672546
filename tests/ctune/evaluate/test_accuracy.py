"""Top-k accuracy: against scikit-learn, ties, guards."""

import re

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from ctune.evaluate.accuracy import topk_accuracy


def test_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator)
    targets = torch.randint(0, 7, (200,), generator=generator)
    expected = [
        top_k_accuracy_score(targets.numpy(), logits.numpy(), k=k, labels=np.arange(7))
        for k in (1, 3, 5)
    ]
    assert topk_accuracy(logits, targets, (1, 3, 5)) == pytest.approx(expected)
    assert topk_accuracy(logits, targets, [7]) == [1.0]


def test_among_equal_logits_the_lower_class_ranks_first() -> None:
    assert topk_accuracy(torch.zeros(4, 4), torch.arange(4), (1, 2, 3)) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("logits", "targets", "topk", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), [1], "must be [n, C]"),
        (torch.zeros(0, 3), torch.zeros(0).long(), [1], "not empty"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), [1], "non-finite"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), [1], "must hold 2 integers"),
        (torch.zeros(2, 3), torch.zeros(2), [1], "dtype torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), [1], "but num_classes is 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), [1], "but num_classes is 3"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), [1, 4], "topk holds 4"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), [0], "topk holds 0"),
    ],
)
def test_refuses(logits: Tensor, targets: Tensor, topk: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        topk_accuracy(logits, targets, topk)
