"""N-pair: the formula written again, known values, stability, the draw of pairs, guards."""

import math
import re

import pytest
import torch
from torch import Tensor

from ctune.losses.n_pair import n_pair_indices, n_pair_loss

PAIRS = torch.tensor([[0, 1], [3, 2], [4, 5]])


def embeddings(N: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, generator=generator, dtype=torch.float64)


def test_equals_the_written_out_formula() -> None:
    e = embeddings()
    total = 0.0
    for i in range(3):
        anchor, positive = e[PAIRS[i, 0]], e[PAIRS[i, 1]]
        exponents = [
            math.exp(float(anchor @ e[PAIRS[j, 1]] - anchor @ positive)) for j in range(3) if j != i
        ]
        total += math.log(1 + sum(exponents))
        total += 0.02 * float(anchor @ anchor + positive @ positive)
    assert n_pair_loss(e, PAIRS).item() == pytest.approx(total / 3, rel=1e-12)


def test_zero_embeddings_give_the_logarithm_of_the_pairs() -> None:
    loss = n_pair_loss(torch.zeros(6, 4, dtype=torch.float64), PAIRS)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-12)


def test_large_embeddings_are_finite_in_float32() -> None:
    e = (1e3 * embeddings()).float().requires_grad_()
    loss = n_pair_loss(e, PAIRS)
    (gradient,) = torch.autograd.grad(loss, e)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_gradcheck() -> None:
    e = embeddings().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: n_pair_loss(x, PAIRS), (e,))


def test_computes_in_float32_under_autocast() -> None:
    e = embeddings().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = n_pair_loss(e, PAIRS)
    assert loss.dtype == torch.float32
    assert loss.item() == n_pair_loss(e, PAIRS).item()


def test_pairs_are_distinct_images_of_every_class_with_two() -> None:
    labels = torch.tensor([7, 7, 3, 1, 3, 3, 1, 9])
    drawn = set()
    for seed in range(50):
        pairs = n_pair_indices(labels, torch.Generator().manual_seed(seed))
        assert pairs.shape == (3, 2)
        assert pairs.dtype == torch.int64
        assert labels[pairs[:, 0]].tolist() == labels[pairs[:, 1]].tolist() == [1, 3, 7]
        assert (pairs[:, 0] != pairs[:, 1]).all()
        drawn.add(tuple(pairs[1].tolist()))
    assert drawn == {(a, b) for a in (2, 4, 5) for b in (2, 4, 5) if a != b}


def test_pairs_are_a_function_of_the_generator() -> None:
    labels = torch.arange(8).repeat(4)
    first, second = (n_pair_indices(labels, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(n_pair_indices(labels)) == 8


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 0, 1, 2]), "gives 1 classes with two images"),
        (torch.tensor([0, 1, 2]), "gives 0 classes"),
        (torch.tensor([0.0, 0.0, 1.0, 1.0]), "1-D tensor of integers"),
        (torch.tensor([[0, 0], [1, 1]]), "shape [2, 2]"),
    ],
)
def test_indices_refuse(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        n_pair_indices(labels)


@pytest.mark.parametrize(
    ("e", "pairs", "l2_reg", "message"),
    [
        (embeddings(), PAIRS[:1], 0.0, "pairs holds 1 pairs"),
        (embeddings(), PAIRS[:, :1], 0.0, "integer [n, 2]"),
        (embeddings(), PAIRS.double(), 0.0, "dtype torch.float64"),
        (embeddings(), PAIRS + 1, 0.0, "outside the 6 embeddings"),
        (embeddings(), PAIRS - 1, 0.0, "outside the 6 embeddings"),
        (embeddings(), PAIRS, -0.1, "l2_reg is -0.1"),
        (embeddings()[0], PAIRS, 0.0, "floating point [N, D]"),
        (embeddings().long(), PAIRS, 0.0, "floating point [N, D]"),
    ],
)
def test_loss_refuses(e: Tensor, pairs: Tensor, l2_reg: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        n_pair_loss(e, pairs, l2_reg=l2_reg)
