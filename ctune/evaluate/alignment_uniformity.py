"""Alignment and uniformity of unit vectors, and how stable vectors are under augmentation.

Sources: Wang & Isola 2020, arXiv 2005.10242, section 4; ml-jku/MAE-CT,
``utils/invariance_utils.py``.
Letters: N samples, D dimensions, A augmentations. All in float64.
"""

import math
from typing import TypedDict

import torch
from torch import Tensor

from ctune.evaluate.inputs import check_features, unit_rows
from ctune.evaluate.isotropy import class_mean_cosines, mean_cosine_similarity

PAIR_BLOCK_ROWS = 1024


class AugmentationInvariance(TypedDict):
    """Result of ``augmentation_invariance``."""

    normalized: float
    unnormalized: float
    norm: float


def alignment(first: Tensor, second: Tensor, *, alpha: float = 2.0) -> float:
    """Mean of |x - y|^alpha over positive pairs of unit vectors: 0 is perfect, at most 2^alpha.

    Args:
        first: [N, D], one view of each image.
        second: [N, D], another view of the same images.
        alpha: above 0.

    Raises:
        ValueError: views not finite [N, D] of one shape; a zero row; alpha not above 0.
    """
    x = unit_rows(check_features(first, "first").double(), "first")
    y = unit_rows(check_features(second, "second").double(), "second")
    if x.shape != y.shape:
        raise ValueError(f"first is {list(x.shape)} and second {list(y.shape)}; they are pairs")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be above 0, 2 is usual")
    return float(torch.linalg.vector_norm(x - y.to(x), dim=1).pow(alpha).mean())


def class_alignment(features: Tensor, labels: Tensor) -> float:
    """Alignment (alpha 2) with every pair of one class as positive pair, from the class sums.

    Args:
        features: [N, D].
        labels: [N] integers.

    Raises:
        ValueError: features not finite [N, D] with N >= 2; a zero row; labels not [N] integers; no
            pair of one class, or none of two.
    """
    return 2 - 2 * class_mean_cosines(features, labels)[0]


def uniformity(features: Tensor, *, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over all pairs of unit vectors: lower is more uniform.

    0 for vectors that are all alike; at least -4 t.

    Args:
        features: [N, D], N >= 2.
        t: above 0.

    Raises:
        ValueError: features not finite [N, D] with N >= 2; a zero row; t not above 0.
    """
    X = unit_rows(check_features(features, min_rows=2).double())
    if not t > 0:
        raise ValueError(f"t is {t}; it must be above 0, 2 is usual")
    N = len(X)
    total = X.new_tensor(-torch.inf)
    for start in range(0, N, PAIR_BLOCK_ROWS):
        rows = X[start : start + PAIR_BLOCK_ROWS]
        exponents = 2 * t * (rows @ X[start:].T - 1)  # |x - y|^2 = 2 - 2 x.y
        later = torch.ones_like(exponents, dtype=torch.bool).triu(1)
        total = torch.logaddexp(total, exponents[later].logsumexp(0))
    return float(total) - math.log(N * (N - 1) / 2)


def augmentation_invariance(features: Tensor, augmented: Tensor) -> AugmentationInvariance:
    """Mean cosine of augmented features with their sample's mean direction, over the mean cosine.

    ``unnormalized``: each augmented feature against the direction of the mean of its sample's unit
    vectors; ``norm``: mean cosine over pairs of unaugmented features; ``normalized``: their ratio,
    above 1 where augmentation changes less than another image does.

    Args:
        features: [N, D], unaugmented.
        augmented: [N, A, D].

    Raises:
        ValueError: not finite [N, D] and [N, A, D] with N >= 2 and A >= 1; a zero vector.
    """
    check_features(features, min_rows=2)
    N, D = features.shape
    if augmented.ndim != 3 or augmented.shape[::2] != (N, D) or not augmented.shape[1]:
        raise ValueError(f"augmented has shape {list(augmented.shape)}; it must be [{N}, A, {D}]")
    flat = unit_rows(check_features(augmented.flatten(0, 1), "augmented").double(), "augmented")
    views = flat.view(augmented.shape)
    means = unit_rows(views.mean(1), "the mean directions")
    unnormalized = float((views * means[:, None]).sum(2).mean())
    norm = mean_cosine_similarity(features)
    if norm == 0:
        raise ValueError("features have a mean cosine of 0, by which nothing can be divided")
    return {"normalized": unnormalized / norm, "unnormalized": unnormalized, "norm": norm}
