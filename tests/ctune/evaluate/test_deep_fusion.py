"""The theorems' constructions and bounds: what they promise, their formulas, guards."""

import math
import re
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from ctune.evaluate.deep_fusion import (
    block_diagonal_attention,
    noise_projection_bounds,
    sharpness_gain_rate,
)

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.tensor([4, 1, 4, 8, 1, 4, 8, 1])


def clustered(dimensions: int = 9) -> Tensor:
    """Samples of three classes, each in a plane of its own, on one side of it."""
    planes = torch.randn(3, 2, dimensions, generator=GENERATOR, dtype=torch.float64)
    weights = 0.2 + torch.rand(8, 2, generator=GENERATOR, dtype=torch.float64)
    classes = torch.unique(LABELS, return_inverse=True)[1]
    return torch.einsum("nw,nwd->nd", weights, planes[classes])


def test_classes_do_not_attend_to_each_other_and_do_to_themselves() -> None:
    # Bases of three planes: two spans of two classes leave each class a direction of its own.
    X = clustered()
    found = block_diagonal_attention(X, LABELS)
    same = LABELS[:, None] == LABELS
    A = found["attention"]
    assert float(A[~same].abs().max()) < 1e-12
    assert bool((found["projected"][same] > 0).all())
    bound = found["lower_bound"][:, None].expand(8, 8)
    assert bool((A[same] >= bound[same] - 1e-12).all())
    assert found["lower_bound"].tolist() == pytest.approx(
        [int((label == LABELS).sum()) * found["rho"] ** 2 for label in LABELS]
    )
    unit = X / X.norm(dim=1, keepdim=True)
    assert found["rho"] == pytest.approx(float((unit @ found["weight"])[same].min()))
    assert found["weight"].norm(dim=0).tolist() == pytest.approx([1.0] * 8)
    torch.testing.assert_close(found["weight"][:, 0], found["weight"][:, 2])


def test_the_direction_is_the_nearest_to_the_mean_among_those_orthogonal_to_all_others() -> None:
    X = clustered()
    unit = X / X.norm(dim=1, keepdim=True)
    found = block_diagonal_attention(3 * X.float(), LABELS)["weight"]
    for label in torch.unique(LABELS):
        mean, others = unit[label == LABELS].mean(0), unit[label != LABELS]
        rest = mean - torch.linalg.pinv(others, rtol=1e-9) @ others @ mean
        column = found[:, int((label == LABELS).nonzero()[0])]
        torch.testing.assert_close(column, rest / rest.norm(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.eye(3), torch.zeros(3, dtype=torch.int64), "at least 2"),
        (torch.eye(3), torch.arange(2), "must hold 3 integers"),
        (torch.zeros(3, 3), torch.arange(3), "zero rows"),
        (torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([0, 0, 1]), "span of the other"),
    ],
)
def test_construction_refuses(features: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        block_diagonal_attention(features, labels)


@pytest.mark.parametrize(("epsilon", "rho"), [(0.05, 0.8), (0.01, 0.3), (0.3, 0.6), (0.0, 1.0)])
def test_noisy_samples_keep_the_bounds_and_reach_them(epsilon: float, rho: float) -> None:
    bounds = noise_projection_bounds(epsilon, rho)
    turns = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    # The clean sample is (1, 0, 0); noisy ones lie on the circle at cosine 1 - epsilon.
    radius = math.sqrt(1 - (1 - epsilon) ** 2)
    noisy = torch.stack(
        [torch.full_like(turns, 1 - epsilon), radius * turns.cos(), radius * turns.sin()], dim=1
    )
    orthogonal = noisy @ torch.tensor([0.0, 1, 0], dtype=torch.float64)
    inclined = noisy @ torch.tensor([rho, math.sqrt(1 - rho**2), 0], dtype=torch.float64)
    assert bounds["within_upper"] == pytest.approx(float(orthogonal.max()), abs=1e-12)
    assert bounds["across_lower"] == pytest.approx(float(inclined.min()), abs=1e-12)


@pytest.mark.parametrize(("epsilon", "rho"), [(-0.1, 0.5), (1.1, 0.5), (0.1, 1.5), (math.nan, 0)])
def test_bounds_refuse(epsilon: float, rho: float) -> None:
    with pytest.raises(ValueError, match=re.escape("must be in [0, 1]")):
        noise_projection_bounds(epsilon, rho)


def exact_ratio(n: int, d: float, D: float) -> float:
    """Return the bound by the formula as it stands, with more digits and no largest number."""
    with localcontext() as context:
        context.prec = 60
        m, x, y = Decimal(n), Decimal(d), Decimal(D)
        a = (m * (x + x * x)).exp()
        c = x * (m * y * y).exp() + a
        top = (y * (y * y).exp() - m * a) ** 2 * (x + m * x * x - m * y * y).exp()
        return float(top / (m**2 * c + m**3 * c**2))


@pytest.mark.parametrize(
    ("n", "d", "D"),
    [(1, 0.2, 0.9), (4, 0.0, 0.6), (10, 0.1, 0.8), (600, 0.3, -0.2), (900, 0.1, 0.8)],
)
def test_gain_rate_is_the_formula_where_its_squares_overflow_too(
    n: int, d: float, D: float
) -> None:
    found = sharpness_gain_rate(n, within_upper=d, across_lower=D)
    assert found["ratio"] == pytest.approx(exact_ratio(n, d, D), rel=1e-9)
    assert found["log_rate"] == pytest.approx(-math.log(n) + n * (d * d - D * D) + d, rel=1e-12)


def test_gain_rate_promises_nothing_and_has_no_ratio_beyond_floats() -> None:
    rates = [sharpness_gain_rate(n, within_upper=0.1, across_lower=0.7) for n in (3, 10, 40)]
    for values in ([rate["ratio"] for rate in rates], [rate["log_rate"] for rate in rates]):
        assert values == sorted(values, reverse=True)
    assert rates[0]["ratio"] < 1
    assert rates[0]["log_rate"] < 0
    large = sharpness_gain_rate(2000, within_upper=0.3, across_lower=0.9)
    assert math.isnan(large["ratio"])
    assert large["log_rate"] == pytest.approx(-math.log(2000) + 2000 * (0.09 - 0.81) + 0.3)


@pytest.mark.parametrize(
    ("n", "d", "D"), [(0, 0.1, 0.5), (3, -0.1, 0.5), (3, math.nan, 0.5), (3, 0.1, math.inf)]
)
def test_gain_rate_refuses(n: int, d: float, D: float) -> None:
    with pytest.raises(ValueError, match=r"sequence_length is 0|noise_projection_bounds"):
        sharpness_gain_rate(n, within_upper=d, across_lower=D)
