"""Low-shot classifiers: scikit-learn's minimum, invariants, the draw, guards."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ctune.evaluate.low_shot import (
    fit_logistic_regression,
    preprocess_low_shot,
    sample_low_shot,
)

C = 4


def samples(N: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % C
    noise = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return torch.eye(C, D, dtype=torch.float64)[labels] + 0.7 * noise, labels


@pytest.mark.parametrize(("N", "D"), [(60, 6), (12, 30)])
@pytest.mark.parametrize("regularization", [0.00025, 0.1])
def test_equals_scikit_learn(N: int, D: int, regularization: float) -> None:
    x, y = samples(N, D)
    ours = fit_logistic_regression(x, y, regularization=regularization)
    assert ours.gradient_norm <= 1e-6
    model = LogisticRegression(
        C=1 / regularization, fit_intercept=False, tol=1e-9, max_iter=20_000
    ).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(ours.weight.numpy(), model.coef_, rtol=1e-3, atol=1e-3)


def test_preprocessed_weights_sum_to_zero_over_features_and_over_classes() -> None:
    x, y = samples(24, 10)
    weight = fit_logistic_regression(preprocess_low_shot(x + 3), y).weight
    torch.testing.assert_close(weight.sum(0), torch.zeros(10).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.sum(1), torch.zeros(C).double(), atol=1e-6, rtol=0)


def test_preprocessing() -> None:
    expected = torch.tensor([[-1.0, 0, 1]]) / 2**0.5
    torch.testing.assert_close(preprocess_low_shot(torch.tensor([[4.0, 5, 6]])), expected)
    x, _ = samples(9, 5)
    torch.testing.assert_close(preprocess_low_shot(7 * x - 2), preprocess_low_shot(x))
    assert preprocess_low_shot(torch.full((1, 4), 2.0)).tolist() == [[0, 0, 0, 0]]


def test_constant_features_give_equal_classes() -> None:
    model = fit_logistic_regression(torch.zeros(8, 3), torch.arange(8) % C)
    assert model.objective == pytest.approx(np.log(C))
    assert torch.equal(model.weight, torch.zeros(C, 3).double())


def test_draws_so_many_of_every_class() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3 + [2])
    rows = sample_low_shot(labels, num_classes=3, shots=2, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [2, 2, 1]
    assert rows.tolist() == sorted(set(rows.tolist()))
    again = sample_low_shot(labels, num_classes=3, shots=2, seed=0)
    others = [sample_low_shot(labels, num_classes=3, shots=2, seed=s) for s in range(1, 9)]
    assert torch.equal(rows, again)
    assert any(not torch.equal(rows, other) for other in others)


@pytest.mark.parametrize(
    ("share", "counts"), [(0.01, [1, 1, 1]), (0.5, [4, 2, 1]), (1.0, [8, 4, 1])]
)
def test_draws_a_share_of_every_class(share: float, counts: list[int]) -> None:
    labels = torch.tensor([0] * 8 + [1] * 4 + [2])
    rows = sample_low_shot(labels, num_classes=3, shots=share, seed=0)
    assert torch.bincount(labels[rows]).tolist() == counts


def test_a_draw_does_not_depend_on_other_classes() -> None:
    labels = torch.tensor([0] * 8 + [1] * 4)
    few = sample_low_shot(labels, num_classes=2, shots=3, seed=5)
    more = sample_low_shot(torch.cat([labels, labels]), num_classes=2, shots=3, seed=5)
    assert len(few) == len(more) == 6
    longer = torch.cat([labels, torch.ones(9).long()])
    drawn = sample_low_shot(longer, num_classes=2, shots=3, seed=5)
    assert drawn[drawn < 8].tolist() == few[few < 8].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: fit_logistic_regression(x, y - 1), "need 2 or more, from 0"),
        (lambda x, y: fit_logistic_regression(x, y * 0), "1 classes"),
        (lambda x, y: fit_logistic_regression(x, y, num_classes=3), "num_classes is 3"),
        (lambda x, y: fit_logistic_regression(x, y, regularization=0.0), "regularization is 0.0"),
        (lambda x, y: fit_logistic_regression(x * torch.inf, y), "non-finite"),
        (lambda x, y: fit_logistic_regression(x, y, num_classes=5), "classes [4] have no train"),
        (lambda x, y: preprocess_low_shot(x[0]), "must be [N, D]"),
        (lambda x, y: sample_low_shot(y, num_classes=6, shots=1, seed=0), "classes [4, 5] have no"),
        (lambda x, y: sample_low_shot(y, num_classes=4, shots=0, seed=0), "shots is 0"),
        (lambda x, y: sample_low_shot(y, num_classes=4, shots=1.5, seed=0), "shots is 1.5"),
    ],
)
def test_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*samples(12, 5))
