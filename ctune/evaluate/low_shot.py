"""Classifiers of frozen features from few labelled images: MAE-CT's low-shot evaluation.

Source: arXiv 2304.10520; facebookresearch/msn, ``logistic_eval.py``. The published 10 % is a
fine-tuning of the whole encoder; here every share trains the classifier of the frozen encoder.
Letters: n samples, D dimensions, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy

from ctune.evaluate.inputs import check_features, check_labels, directions

GRADIENT_NORM = 1e-6
MAX_ITERATIONS = 20_000
CORRECTIONS = 30
"""Pairs that L-BFGS remembers: the problem is nearly unregularised, so its curvature matters."""


class LogisticRegression(NamedTuple):
    """Result of ``fit_logistic_regression``, float64."""

    weight: Tensor
    """[C, D], no intercept."""
    objective: float
    """The minimised value."""
    gradient_norm: float
    """Where the search ended; above 1e-6 it stopped early."""

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [n, C] of features [n, D], preprocessed as those of the training."""
        return features.to(self.weight) @ self.weight.T


def preprocess_low_shot(features: Tensor) -> Tensor:
    """Subtract from each row [D] its mean and bring it to unit length; a zero row stays zero.

    Args:
        features: [n, D].

    Raises:
        ValueError: features not finite [n, D].
    """
    X = check_features(features)
    return directions(X - X.mean(1, keepdim=True))


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    regularization: float = 0.00025,
) -> LogisticRegression:
    """Minimise mean cross-entropy plus (lambda / 2) |W|^2, lambda = regularization / n, from W = 0.

    L-BFGS in float64 to a gradient norm of 1e-6.

    Args:
        features: [n, D], preprocessed by the caller.
        labels: [n] integers in [0, C).
        num_classes: C; None: the largest label plus 1.
        regularization: above 0; 0.00025 is scikit-learn's C = 4000 for any n.

    Raises:
        ValueError: features not finite [n, D]; labels not [n] integers in [0, C); fewer than 2
            classes, or one without a sample; regularization not above 0.
    """
    X = check_features(features).double()
    y = check_labels(labels, len(X), num_classes=num_classes).to(X.device)
    C = int(y.max()) + 1 if num_classes is None else num_classes
    if C < 2 or int(y.min()) < 0:
        raise ValueError(f"labels has {C} classes from {int(y.min())}; need 2 or more, from 0")
    _check_every_class(y, C)
    if not regularization > 0:
        raise ValueError(f"regularization is {regularization}; it must be above 0")
    # The minimum lies in the span of the samples: with few of them the problem has n dimensions.
    basis = torch.linalg.qr(X.T).Q if len(X) < X.shape[1] else None
    x = X if basis is None else X @ basis
    strength = regularization / len(X)

    def value_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = torch.from_numpy(flat).to(x).view(C, -1)
        logits = x @ weight.T
        error = logits.softmax(1)
        error[torch.arange(len(y), device=y.device), y] -= 1
        gradient = error.T @ x / len(x) + strength * weight
        value = cross_entropy(logits, y) + strength / 2 * weight.square().sum()
        return float(value), gradient.flatten().cpu().numpy()

    size = C * x.shape[1]
    options = {
        "gtol": GRADIENT_NORM / size**0.5,  # of the largest entry: the norm is below then
        "ftol": 0.0,
        "maxiter": MAX_ITERATIONS,
        "maxfun": 2 * MAX_ITERATIONS,
        "maxcor": CORRECTIONS,
    }
    found = minimize(
        value_and_gradient, np.zeros(size), jac=True, method="L-BFGS-B", options=options
    )
    weight = torch.from_numpy(found.x).to(x).view(C, -1)
    return LogisticRegression(
        weight if basis is None else weight @ basis.T,
        float(found.fun),
        float(np.linalg.norm(found.jac)),
    )


def sample_low_shot(labels: Tensor, *, num_classes: int, shots: int | float, seed: int) -> Tensor:
    """Draw labelled samples of every class without replacement; sorted rows.

    Args:
        labels: [N] integers in [0, C).
        num_classes: C.
        shots: samples per class, or all of a class that has fewer; a float: that share of each
            class, at least one sample.
        seed: of the draw; another class's samples do not change it.

    Raises:
        ValueError: a class without a sample; shots not above 0, or a share above 1.
    """
    checked = check_labels(labels, len(labels), num_classes=num_classes)
    _check_every_class(checked, num_classes)
    y = checked.cpu().numpy()
    if not shots > 0 or (isinstance(shots, float) and shots > 1):
        raise ValueError(f"shots is {shots}; it must be a count of at least 1 or a share up to 1")
    drawn = []
    for label in range(num_classes):
        members = np.flatnonzero(y == label)
        count = max(1, round(shots * len(members))) if isinstance(shots, float) else shots
        rng = np.random.default_rng([seed % 2**64, label])
        drawn.append(rng.permutation(members)[:count])
    return torch.from_numpy(np.sort(np.concatenate(drawn))).to(labels.device)


def _check_every_class(labels: Tensor, num_classes: int) -> None:
    missing = sorted(set(range(num_classes)) - set(torch.unique(labels).tolist()))
    if missing:
        raise ValueError(f"classes {missing[:10]} have no train sample; every class needs one")
