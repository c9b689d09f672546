"""Effective rank and spread of features, without labels: small values say that they collapse.

Letters: N samples, D dimensions. Cost: O(N D min(N, D)) for the singular values, in float64.
"""

import math

import torch
from torch import Tensor

from ctune.evaluate.inputs import check_features, directions


def rankme(features: Tensor, *, eps: float = 1e-7, center: bool = False) -> float:
    """RankMe, exp(-sum_i p_i log p_i) with p_i = sigma_i / sum_j sigma_j + eps: 1 to min(N, D).

    Source: Garrido et al. 2023, arXiv 2210.02885, Eq. 1. The singular values sigma are those of the
    features as they are; ``eps`` lifts the value a little above the entropy's, and even above the
    true rank.

    Args:
        features: [N, D].
        eps: at least 0; with 0 a vanished singular value counts nothing.
        center: subtract the mean row first, so that a shared offset is no direction.

    Raises:
        ValueError: features not finite [N, D]; features without any non-zero value, after centring
            where that is asked for; eps negative.
    """
    X = check_features(features).double()
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be at least 0, 1e-7 is usual")
    sigma = torch.linalg.svdvals(X - X.mean(0) if center else X)
    total = sigma.sum()
    if not float(total) > 0:
        raise ValueError("features are all zero, or all alike and centred: they have no rank")
    p = sigma / total + eps
    return math.exp(-float(torch.xlogy(p, p).sum()))


def feature_spread(features: Tensor) -> float:
    """Mean standard deviation per dimension of unit vectors times sqrt(D), in [0, 1].

    1 for vectors in all directions, 0 for vectors that are all alike; a zero row stays zero.
    Source: the collapse check of SimSiam, arXiv 2011.10566, section 4.1.

    Args:
        features: [N, D].

    Raises:
        ValueError: features not finite [N, D].
    """
    X = directions(check_features(features).double())
    return float(X.std(0, correction=0).mean()) * math.sqrt(X.shape[1])
