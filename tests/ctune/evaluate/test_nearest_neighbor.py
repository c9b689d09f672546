"""The nearest other image: scikit-learn's answer, ties, self-exclusion, blocks, guards."""

import re
from typing import Any

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from ctune.evaluate import nearest_neighbor
from ctune.evaluate.nearest_neighbor import nearest_neighbor_accuracy

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, 3, (70,), generator=GENERATOR)
FEATURES = torch.eye(3, 8)[LABELS] + 0.5 * torch.randn(70, 8, generator=GENERATOR)


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_scikit_learn(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = FEATURES * torch.linspace(0.5, 4, 70)[:, None]
    x = torch.nn.functional.normalize(scaled) if normalize else scaled
    found = NearestNeighbors(n_neighbors=2).fit(x.numpy()).kneighbors(return_distance=False)
    expected = (LABELS[found[:, 0]] == LABELS).double().mean().item()
    assert nearest_neighbor_accuracy(scaled, LABELS, normalize=normalize) == expected
    monkeypatch.setattr(nearest_neighbor, "BLOCK_ROWS", 16)
    assert nearest_neighbor_accuracy(scaled, LABELS, normalize=normalize) == expected


def test_equally_near_goes_to_the_lowest_other_index() -> None:
    same = torch.randn(1, 300, generator=GENERATOR).expand(40, -1)
    labels = torch.tensor([1, 1, *[0] * 38])
    # Row 0 sees row 1, all others see row 0.
    for normalize in (True, False):
        assert nearest_neighbor_accuracy(same, labels, normalize=normalize) == 2 / 40


def test_a_duplicate_is_a_neighbour_and_oneself_is_not() -> None:
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.1, 1]])
    assert nearest_neighbor_accuracy(features, torch.tensor([0, 0, 1, 1])) == 1
    assert nearest_neighbor_accuracy(features, torch.arange(4)) == 0


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (FEATURES[:1], LABELS[:1], "at least 2"),
        (FEATURES, LABELS[:3], "must hold 70 integers"),
        (FEATURES * torch.nan, LABELS, "non-finite"),
    ],
)
def test_refuses(features: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        nearest_neighbor_accuracy(features, labels)
