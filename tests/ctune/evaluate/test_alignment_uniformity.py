"""Alignment, uniformity, invariance under augmentation: known answers, blocks, guards."""

import math
import re
from typing import Any

import pytest
import torch

from ctune.evaluate import alignment_uniformity
from ctune.evaluate.alignment_uniformity import (
    alignment,
    augmentation_invariance,
    class_alignment,
    uniformity,
)

FEATURES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(50) % 3


def test_alignment_by_hand() -> None:
    first, second = torch.tensor([[1.0, 0], [0, 3]]), torch.tensor([[0.0, 5], [0, 1]])
    assert alignment(first, second) == pytest.approx((2 + 0) / 2)
    assert alignment(first, second, alpha=1) == pytest.approx(2**0.5 / 2)
    assert alignment(first, -first) == pytest.approx(4)


def test_class_alignment_is_the_mean_over_pairs_of_a_class() -> None:
    rows = [(i, j) for i in range(50) for j in range(i) if LABELS[i] == LABELS[j]]
    first, second = (FEATURES[[pair[k] for pair in rows]] for k in (0, 1))
    assert class_alignment(FEATURES, LABELS) == pytest.approx(alignment(first, second))


def test_uniformity_by_hand() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-8)
    three = torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    expected = math.log((math.exp(-8) + 2 * math.exp(-4)) / 3)
    assert uniformity(three) == pytest.approx(expected)
    assert uniformity(three, t=1000) == pytest.approx(-2000 + math.log(2 / 3))


def test_uniformity_does_not_depend_on_blocks_scale_or_rotation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = uniformity(FEATURES)
    unit = torch.nn.functional.normalize(FEATURES)
    pairs = torch.nn.functional.pdist(unit).square().mul(-2).exp().mean().log()
    assert expected == pytest.approx(float(pairs))
    rotation = torch.linalg.qr(FEATURES[:6]).Q
    assert uniformity(3 * FEATURES @ rotation) == pytest.approx(expected)
    monkeypatch.setattr(alignment_uniformity, "PAIR_BLOCK_ROWS", 7)
    assert uniformity(FEATURES) == pytest.approx(expected)
    monkeypatch.setattr(alignment_uniformity, "PAIR_BLOCK_ROWS", 49)
    assert uniformity(FEATURES) == pytest.approx(expected)


def test_features_that_augmentation_does_not_change() -> None:
    augmented = FEATURES[:, None].repeat(1, 3, 1) * torch.tensor([1.0, 2, 5])[None, :, None]
    scores = augmentation_invariance(FEATURES + 3, augmented + 0)
    assert scores["unnormalized"] == pytest.approx(1)
    assert scores["normalized"] == pytest.approx(1 / scores["norm"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignment(FEATURES, FEATURES[:3]), "they are pairs"),
        (lambda: alignment(FEATURES, FEATURES, alpha=0), "alpha is 0"),
        (lambda: alignment(FEATURES, FEATURES * 0), "second holds 50 zero rows"),
        (lambda: uniformity(FEATURES, t=0), "t is 0"),
        (lambda: uniformity(FEATURES[:1]), "at least 2"),
        (lambda: class_alignment(FEATURES, torch.arange(50)), "no same-class pair"),
        (lambda: augmentation_invariance(FEATURES, FEATURES), "must be [50, A, 6]"),
        (lambda: augmentation_invariance(FEATURES, torch.zeros(50, 2, 6)), "zero rows"),
    ],
)
def test_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
