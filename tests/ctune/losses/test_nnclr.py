"""NNCLR's loss: the formula written again, known values, bounds, symmetries, shares, guards."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ctune.losses.nnclr import nnclr_loss
from ctune.unit_length import unit_length

TEMPERATURE = 0.15


def vectors(count: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64)


def pair(count: int = 6) -> tuple[Tensor, Tensor]:
    return vectors(count), unit_length(vectors(count, seed=1))


@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_written_out_formula(transposed: bool) -> None:
    predicted, neighbors = pair()
    p = predicted / predicted.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        logits = [
            float(neighbors[j] @ p[i] if transposed else neighbors[i] @ p[j]) / TEMPERATURE
            for j in range(6)
        ]
        total -= math.log(math.exp(logits[i]) / sum(map(math.exp, logits)))
    loss = nnclr_loss(predicted, neighbors, temperature=TEMPERATURE, transposed=transposed)
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)


def test_identical_inputs_give_the_logarithm_of_the_batch() -> None:
    same = vectors(1).expand(7, 4)
    loss = nnclr_loss(same, unit_length(same), temperature=TEMPERATURE)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-12)


def test_orthonormal_alignment_of_1024_images() -> None:
    rows = torch.eye(1024)
    loss = nnclr_loss(3 * rows, rows, temperature=TEMPERATURE)
    assert loss.item() == pytest.approx(math.log(1 + 1023 * math.exp(-1 / TEMPERATURE)), rel=1e-5)
    assert loss.item() == pytest.approx(0.834, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_bounds(seed: int) -> None:
    predicted = vectors(8, seed)
    for neighbors in (unit_length(vectors(8, seed + 10)), -unit_length(predicted)):
        loss = nnclr_loss(predicted, neighbors, temperature=TEMPERATURE).item()
        assert 0 < loss <= 2 / TEMPERATURE + math.log(8)


def test_neither_the_order_of_images_nor_the_length_of_predictions_matters() -> None:
    predicted, neighbors = pair()
    loss = nnclr_loss(predicted, neighbors, temperature=TEMPERATURE)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = nnclr_loss(predicted[order], neighbors[order], temperature=TEMPERATURE)
    scaled = nnclr_loss(17.0 * predicted, neighbors, temperature=TEMPERATURE)
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(scaled, loss)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_is_exact_and_at_right_angles_to_each_prediction(transposed: bool) -> None:
    predicted, neighbors = pair()
    predicted.requires_grad_()

    def loss_of(p: Tensor) -> Tensor:
        return nnclr_loss(p, neighbors, temperature=TEMPERATURE, transposed=transposed)

    assert torch.autograd.gradcheck(loss_of, predicted)
    (gradient,) = torch.autograd.grad(loss_of(predicted), predicted)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close((gradient * predicted).sum(1), torch.zeros(6).double())


def test_the_mean_over_shares_is_the_loss_of_the_whole() -> None:
    predicted, neighbors = pair()
    shares = [
        nnclr_loss(predicted, neighbors[i : i + 2], temperature=TEMPERATURE, label_offset=i)
        for i in (0, 2, 4)
    ]
    whole = nnclr_loss(predicted, neighbors, temperature=TEMPERATURE)
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_half_precision_is_computed_in_float32_under_autocast() -> None:
    predicted, neighbors = pair()
    half = predicted.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nnclr_loss(half, neighbors.float(), temperature=0.01)
    assert loss.dtype == torch.float32
    exact = nnclr_loss(half.double(), neighbors, temperature=0.01)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"label_offset": 1}, "6 rows from label_offset 1 on do not lie in the 6 candidates"),
        ({"label_offset": -1}, "label_offset -1"),
        ({"neighbors": torch.ones(6, 3)}, "the same last dimension"),
        ({"neighbors": torch.ones(6)}, "both must be 2-D"),
        ({"neighbors": torch.ones(0, 4)}, "0 rows"),
        ({"neighbors": torch.ones(7, 4)}, "7 rows"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    predicted, neighbors = pair()
    given: dict[str, Any] = {"neighbors": neighbors, "temperature": TEMPERATURE} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        nnclr_loss(predicted, **given)
