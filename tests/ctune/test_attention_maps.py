"""Attention by class: known values, the formulas written out, invariances, guards."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ctune.attention_maps import (
    attention_statistics,
    class_attention_statistics,
    positive_attention_mass,
    sharpness,
    sort_attention_by_class,
)

LABELS = torch.tensor([3, 0, 3, 7, 0, 3, 7, 0])


def maps(*shape: int, seed: int = 0) -> Tensor:
    drawn: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.double().softmax(-1)


ATTENTION = maps(8, 8)
BLOCKS = (LABELS[:, None] == LABELS).double() / (LABELS[:, None] == LABELS).sum(1, keepdim=True)


def test_sorting_puts_classes_together_in_their_order() -> None:
    found = sort_attention_by_class(ATTENTION, LABELS)
    assert found["order"].tolist() == [1, 4, 7, 0, 2, 5, 3, 6]
    for row, i in enumerate(found["order"]):
        for column, j in enumerate(found["order"]):
            assert found["attention"][row, column] == ATTENTION[i, j]


@pytest.mark.parametrize("include_diagonal", [True, False])
def test_sharpness_is_the_least_within_over_the_largest_across(include_diagonal: bool) -> None:
    within, across = [], []
    for i in range(8):
        for j in range(8):
            if LABELS[i] != LABELS[j]:
                across.append(float(ATTENTION[i, j]))
            elif include_diagonal or i != j:
                within.append(float(ATTENTION[i, j]))
    found = sharpness(ATTENTION, LABELS, include_diagonal=include_diagonal)
    assert found == pytest.approx(min(within) / max(across), rel=1e-12)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    permuted = ATTENTION[order][:, order]
    assert sharpness(permuted, LABELS[order], include_diagonal=include_diagonal) == found


def test_sharpness_of_blocks_of_even_attention_and_of_nothing() -> None:
    assert sharpness(BLOCKS, LABELS) == math.inf
    assert sharpness(torch.full((8, 8), 1 / 8), LABELS) == 1
    assert math.isnan(sharpness(torch.zeros(8, 8), LABELS))
    # Only the diagonal is low.
    assert sharpness(1 - torch.eye(8), LABELS) == 0
    assert sharpness(1 - torch.eye(8), LABELS, include_diagonal=False) == 1


def test_class_statistics_are_those_of_the_formulas() -> None:
    shares, chances, within, across = [], [], [], []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        same = [j for j in others if LABELS[j] == LABELS[i]]
        total = sum(float(ATTENTION[i, j]) for j in others)
        shares.append(sum(float(ATTENTION[i, j]) for j in same) / total)
        chances.append(len(same) / 7)
        within += [float(ATTENTION[i, j]) for j in same]
        across += [float(ATTENTION[i, j]) for j in others if j not in same]
    found = dict(class_attention_statistics(ATTENTION.float(), LABELS))
    mass, chance = sum(shares) / 8, sum(chances) / 8
    assert found == {
        "same_class_mass": pytest.approx(mass, rel=1e-6),
        "chance_mass": pytest.approx(chance, rel=1e-12),
        "lift": pytest.approx(mass / chance, rel=1e-6),
        "same_class_mean": pytest.approx(sum(within) / len(within), rel=1e-6),
        "cross_class_mean": pytest.approx(sum(across) / len(across), rel=1e-6),
    }


def test_class_statistics_of_blocks_of_even_attention_and_of_self_attention() -> None:
    assert class_attention_statistics(BLOCKS, LABELS)["same_class_mass"] == pytest.approx(1)
    even = class_attention_statistics(torch.full((8, 8), 1 / 8), LABELS)
    assert even["lift"] == pytest.approx(1)
    # A token that attends to itself only counts as nothing.
    some = BLOCKS.clone()
    some[0] = torch.eye(8)[0]
    assert class_attention_statistics(some, LABELS)["same_class_mass"] == pytest.approx(7 / 8)


def test_statistics_of_every_head_of_every_layer() -> None:
    layers = [maps(3, 8, 8, seed=seed) for seed in (1, 2)]
    found = attention_statistics(iter(layers), LABELS)
    assert [len(heads) for heads in found] == [3, 3]
    for layer, heads in zip(layers, found, strict=True):
        for attention, head in zip(layer, heads, strict=True):
            assert head == {
                **class_attention_statistics(attention, LABELS),
                "sharpness": sharpness(attention, LABELS),
                "sharpness_off_diagonal": sharpness(attention, LABELS, include_diagonal=False),
            }


def test_positive_mass_of_copying_of_even_attention_and_of_any() -> None:
    copying = torch.eye(6).roll(3, 0)
    attention = torch.stack([copying, torch.full((6, 6), 1 / 6), maps(6, 6).float()])
    found = positive_attention_mass(attention, 3)
    any_head = sum(float(attention[2, i, (i + 3) % 6]) for i in range(6)) / 6
    assert found["per_head"].tolist() == pytest.approx([1, 1 / 6, any_head], rel=1e-6)
    assert found["chance"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("attention", "labels", "message"),
    [
        (ATTENTION[:3], LABELS, "must be [n, n]"),
        (ATTENTION * torch.nan, LABELS, "non-finite"),
        (ATTENTION, LABELS[:3], "must hold 8 integers"),
        (ATTENTION, LABELS.float(), "must hold 8 integers"),
    ],
)
@pytest.mark.parametrize(
    "function", [sort_attention_by_class, sharpness, class_attention_statistics]
)
def test_refuses(function: Any, attention: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function(attention, labels)


def test_refuses_labels_without_pairs() -> None:
    with pytest.raises(ValueError, match="a single class"):
        sharpness(ATTENTION, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="a single class"):
        class_attention_statistics(ATTENTION, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="no class with two tokens"):
        sharpness(ATTENTION, torch.arange(8), include_diagonal=False)
    with pytest.raises(ValueError, match="no class with two tokens"):
        class_attention_statistics(ATTENTION, torch.arange(8))
    assert sharpness(ATTENTION, torch.arange(8)) > 0


@pytest.mark.parametrize(("shape", "batch_size"), [((6, 6), 3), ((2, 6, 6), 2), ((2, 0, 0), 0)])
def test_positive_mass_refuses(shape: tuple[int, ...], batch_size: int) -> None:
    with pytest.raises(ValueError, match=re.escape("[H, 2B, 2B]")):
        positive_attention_mass(torch.zeros(shape), batch_size)
