"""Attention that separates classes by construction, and what noise does to it. All in float64.

Source: arXiv 2403.18681, Theorems 1 and 2. They say what one layer can do; none of it is a promise
about a trained head. Letters: n samples, d dimensions, K classes.
"""

import math
from typing import TypedDict

import torch
from torch import Tensor

from ctune.evaluate.cluster_integrity import class_members, relative_tolerance, span_basis
from ctune.evaluate.inputs import check_features, check_labels, unit_rows

LEAST_NORM = 1e-10
LARGEST_EXPONENT = 700


class BlockDiagonalAttention(TypedDict):
    """Result of ``block_diagonal_attention``."""

    weight: Tensor
    """[d, n]"""
    projected: Tensor
    """[n, n]: features times weight."""
    attention: Tensor
    """[n, n]: projected times its transpose."""
    rho: float
    lower_bound: Tensor
    """[n]"""


class NoiseBounds(TypedDict):
    """Result of ``noise_projection_bounds``."""

    within_upper: float
    across_lower: float


class SharpnessGain(TypedDict):
    """Result of ``sharpness_gain_rate``."""

    ratio: float
    log_rate: float


def block_diagonal_attention(features: Tensor, labels: Tensor) -> BlockDiagonalAttention:
    """Return weights whose attention is zero between any two classes (Theorem 1).

    The direction of a class is its mean less what lies in the span of all other classes, at unit
    length; column j of ``weight`` is that of sample j's class. ``rho`` is the least product of a
    sample with its own direction. Within a class attention is at least ``lower_bound`` =
    (samples of the class) * rho^2, provided that these products have one sign, which the paper
    does not say. Rows are brought to unit length first.

    Args:
        features: [n, d].
        labels: [n] integers.

    Raises:
        ValueError: features not finite [n, d]; a zero row; labels not [n] integers; fewer than two
            classes; a class whose mean lies in the span of the others.
    """
    checked = check_features(features)
    X = unit_rows(checked.double())
    y = check_labels(labels, len(X)).to(X.device)
    _, own = class_members(y)
    tolerance = relative_tolerance(checked)
    directions = torch.stack([_own_direction(X, members, tolerance) for members in own])
    row_class = own.int().argmax(0)
    W = directions[row_class].T
    projected = X @ W
    rho = float((X * W.T).sum(1).min())
    return {
        "weight": W,
        "projected": projected,
        "attention": projected @ projected.T,
        "rho": rho,
        "lower_bound": own.sum(1)[row_class] * rho**2,
    }


def _own_direction(X: Tensor, members: Tensor, tolerance: float) -> Tensor:
    mean = X[members].mean(0)
    others = span_basis(X[~members], tolerance)
    rest = mean - others @ (others.T @ mean)
    norm = float(torch.linalg.vector_norm(rest))
    if norm < LEAST_NORM:
        raise ValueError(
            "the mean of a class lies in the span of the other classes, so that no direction is its"
            " own; use fewer samples or more dimensions"
        )
    return rest / norm


def noise_projection_bounds(epsilon: float, rho: float) -> NoiseBounds:
    """Return how large a noisy sample's products with directions can be: classes part if d < D.

    ``within_upper`` d = sqrt(1 - (1-e)^2) bounds the product with a direction that is orthogonal to
    the sample's own class; ``across_lower`` D = (1-e) rho - sqrt((1 - (1-e)^2) (1 - rho^2)), which
    may be negative, that with a direction whose product with the clean sample is at least rho.

    Args:
        epsilon: 1 less the cosine of a sample and its clean one, in [0, 1].
        rho: cluster integrity of the clean samples, in [0, 1].

    Raises:
        ValueError: a value outside [0, 1].
    """
    for name, value in (("epsilon", epsilon), ("rho", rho)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be in [0, 1]")
    noise = epsilon * (2 - epsilon)  # 1 - (1 - epsilon)^2
    return {
        "within_upper": math.sqrt(noise),
        "across_lower": (1 - epsilon) * rho - math.sqrt(noise * (1 - rho * rho)),
    }


def sharpness_gain_rate(
    sequence_length: int, *, within_upper: float, across_lower: float
) -> SharpnessGain:
    """Return the bound of Theorem 2 on what a layer multiplies sharpness by, and its rate's log.

    Only to be described, never to be held against a measured sharpness: with d < D and n >= 3 both
    are below 1, so that they promise no gain at all, and the proof squares a bound that is negative
    from n = 3 on. With a = e^(n(d+d^2)) and c = d e^(nD^2) + a:

    ``ratio`` = (D e^(D^2) - n a)^2 e^(d+nd^2-nD^2) / (n^2 c + n^3 c^2), NaN where an exponent is
    above 700; ``log_rate`` = n(d^2 - D^2) + d - ln n.

    Args:
        sequence_length: n, at least 1.
        within_upper: d, not negative, of ``noise_projection_bounds``.
        across_lower: D, of the same.

    Raises:
        ValueError: sequence_length below 1; within_upper negative; a value that is not finite.
    """
    n, d, D = sequence_length, within_upper, across_lower
    if n < 1:
        raise ValueError(f"sequence_length is {n}; it must be at least 1")
    if not (0 <= d < math.inf and math.isfinite(D)):
        raise ValueError(f"within_upper is {d} and across_lower {D}; see noise_projection_bounds")
    log_rate = n * (d * d - D * D) + d - math.log(n)
    exponents = (D * D, n * (d + d * d), d + n * (d * d - D * D), n * D * D)
    if max(exponents) > LARGEST_EXPONENT:
        return {"ratio": math.nan, "log_rate": log_rate}
    of_own, of_a, of_gain, of_c = map(math.exp, exponents)
    c = d * of_c + of_a
    # Both sides of the fraction are divided by c^2, which may be too large for a float.
    ratio = (D * of_own / c - n * (of_a / c)) ** 2 * of_gain / (n**2 / c + n**3)
    return {"ratio": ratio, "log_rate": log_rate}
