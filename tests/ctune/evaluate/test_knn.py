"""Weighted k-NN: against scikit-learn, limits, ties, blocks, guards."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ctune.evaluate import knn
from ctune.evaluate.knn import knn_accuracy, knn_classify, knn_scores, nearest_neighbors


def samples(N: int, seed: int, D: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (N,), generator=generator)
    noise = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return torch.eye(4, D, dtype=torch.float64)[labels] + 0.8 * noise, labels


TRAIN, TRAIN_LABELS = samples(150, 0)
TEST, TEST_LABELS = samples(60, 1)


@pytest.mark.parametrize("k", [1, 5, 20, 150])
@pytest.mark.parametrize("weighting", ["distance", "uniform"])
@pytest.mark.parametrize("standardize", [False, True])
def test_equals_scikit_learn(k: int, weighting: Any, standardize: bool) -> None:
    train, test = TRAIN.numpy(), TEST.numpy()
    if standardize:
        scaler = StandardScaler().fit(train)
        unbiased = np.sqrt(len(train) / (len(train) - 1))
        train, test = scaler.transform(train) / unbiased, scaler.transform(test) / unbiased
    vote = (lambda d: np.exp((1 - d) / 0.07)) if weighting == "distance" else "uniform"
    model = KNeighborsClassifier(k, weights=vote, metric="cosine", algorithm="brute")
    model.fit(train, TRAIN_LABELS.numpy())
    expected = model.predict_proba(test)
    result = knn_classify(
        TRAIN,
        TRAIN_LABELS,
        TEST,
        k=k,
        temperature=0.07,
        weighting=weighting,
        standardize=standardize,
    )
    shares = (result.scores / result.scores.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(shares, expected, rtol=1e-3 if standardize else 1e-9, atol=1e-12)
    assert result.predictions.tolist() == model.predict(test).tolist()
    assert result.neighbors.shape == (60, k)


def test_scores_are_sums_of_exponentials() -> None:
    train = torch.tensor([[1.0, 0], [0, 2.0], [-3.0, 0]])
    result = knn_classify(
        train, torch.tensor([0, 1, 0]), torch.tensor([[5.0, 0]]), num_classes=3, k=3, temperature=1
    )
    expected = torch.tensor([[math.e + 1 / math.e, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(result.scores, expected)
    assert result.neighbors.tolist() == [[0, 1, 2]]


def test_all_uniform_votes_give_the_majority_class() -> None:
    result = knn_classify(TRAIN, TRAIN_LABELS, TEST, k=150, weighting="uniform")
    majority = int(TRAIN_LABELS.bincount().argmax())
    assert result.predictions.tolist() == [majority] * 60


def test_does_not_depend_on_the_length_of_rows() -> None:
    scale = torch.linspace(0.1, 30, 150, dtype=torch.float64)[:, None]
    expected = knn_classify(TRAIN, TRAIN_LABELS, TEST)
    scaled = knn_classify(TRAIN * scale, TRAIN_LABELS, TEST * 3)
    assert torch.equal(scaled.predictions, expected.predictions)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = knn_classify(TRAIN, TRAIN_LABELS, TEST)
    monkeypatch.setattr(knn, "BLOCK_ENTRIES", 7 * 150)
    blocked = knn_classify(TRAIN, TRAIN_LABELS, TEST)
    assert torch.equal(blocked.neighbors, expected.neighbors)
    torch.testing.assert_close(blocked.scores, expected.scores)


def test_equal_scores_go_to_the_lowest_class() -> None:
    train = torch.tensor([[1.0, 0], [1.0, 0]])
    result = knn_classify(train, torch.tensor([2, 1]), train[:1], k=2, weighting="uniform")
    assert result.predictions.tolist() == [1]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_equal_similarities_go_to_the_lowest_row(k: int) -> None:
    train = torch.tensor([[0.0, 1], [1, 0], [2, 0], [1, 1], [3, 0]])
    result = knn_classify(train, torch.tensor([0, 1, 2, 3, 4]), torch.tensor([[5.0, 0]]), k=k)
    assert result.neighbors.tolist() == [[1, 2, 4, 3, 0][:k]]


def test_constant_features_choose_the_first_rows() -> None:
    values, index = nearest_neighbors(torch.ones(9, 2), torch.ones(3, 2), k=4)
    assert index.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(values, torch.ones(3, 4))


def test_a_zero_row_is_similar_to_nothing() -> None:
    result = knn_classify(
        torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([0, 1]), torch.zeros(1, 2), k=2
    )
    assert result.scores.tolist() == [[1, 1]]


def test_several_k_share_one_search() -> None:
    scores = knn_scores(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS, ks=(1, 10, 20))
    assert list(scores) == [1, 10, 20]
    for k, one in scores.items():
        result = knn_classify(TRAIN, TRAIN_LABELS, TEST, k=k)
        assert one.top1 == result.accuracy(TEST_LABELS)
        assert one.purity == result.purity(TEST_LABELS)
        assert one.top5 == (one.top1 if k == 1 else 1)
    assert scores[1].purity == scores[1].top1


def test_purity_is_the_share_of_neighbours_with_the_label() -> None:
    train = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    result = knn_classify(train, torch.tensor([0, 1, 1, 1]), torch.eye(2), k=2)
    assert result.purity(torch.tensor([0, 1])) == 0.75
    assert result.purity(torch.tensor([2, 2])) == 0


def test_accuracy() -> None:
    predictions = knn_classify(TRAIN, TRAIN_LABELS, TEST, k=10).predictions
    expected = (predictions == TEST_LABELS).double().mean().item()
    value = knn_accuracy(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS, k=10)
    assert value == pytest.approx(expected)
    assert value > 0.4
    assert knn_accuracy(TRAIN, TRAIN_LABELS, TRAIN, TRAIN_LABELS, k=1) == 1
    assert knn_accuracy(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS + 100) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_floating_types(dtype: torch.dtype) -> None:
    result = knn_classify(TRAIN.to(dtype), TRAIN_LABELS, TEST.to(dtype))
    assert result.scores.dtype == torch.float64
    expected = knn_classify(TRAIN, TRAIN_LABELS, TEST).predictions
    assert (result.predictions == expected).double().mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 151}, "k is 151, but there are 150"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 1e-4}, "at least 1/700"),
        ({"weighting": "cosine"}, "weighting is 'cosine'"),
        ({"num_classes": 3}, "num_classes is 3"),
        ({"train_labels": TRAIN_LABELS - 1}, "lies in [-1, 2]"),
        ({"train_labels": TRAIN_LABELS.double()}, "dtype torch.float64"),
        ({"train_labels": TRAIN_LABELS[:9]}, "must hold 150 integers"),
        ({"test_features": TEST[:, :3]}, "test_features has 3 dimensions"),
        ({"test_features": TEST[:0]}, "holds 0 rows; at least 1"),
        ({"test_features": TEST[0]}, "must be [N, D]"),
        (
            {
                "train_features": TRAIN[:1],
                "train_labels": TRAIN_LABELS[:1],
                "k": 1,
                "standardize": True,
            },
            "single train sample",
        ),
        ({"train_features": TRAIN * torch.nan}, "train_features holds a non-finite"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    options = {
        "train_features": TRAIN, "train_labels": TRAIN_LABELS, "test_features": TEST, **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        knn_classify(**options)


def test_accuracy_refuses_other_labels() -> None:
    with pytest.raises(ValueError, match="must hold 60 integers"):
        knn_accuracy(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS[:5])
