"""Weighted k-nearest-neighbour classification of frozen features.

Sources: Wu et al. 2018, arXiv 1805.01978, section 3.4; facebookresearch/dino, ``eval_knn.py``.
Letters: N train and M test samples, D dimensions, C classes, k neighbours.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Weighting = Literal["distance", "uniform"]

# Similarities held at a time: 128 MiB in float64.
BLOCK_ENTRIES = 2**24
# exp(1 / temperature) must stay finite in float64.
MIN_TEMPERATURE = 1 / 700


class KNNResult(NamedTuple):
    """Result of ``knn_classify``."""

    predictions: Tensor
    """[M] int64: class of the largest score, the lowest class among equal ones."""
    scores: Tensor
    """[M, C] float64: sum of the votes for each class."""
    neighbors: Tensor
    """[M, k] int64 rows of the train features, most similar first."""


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int | None = None,
    k: int = 20,
    temperature: float = 0.07,
    weighting: Weighting = "distance",
    standardize: bool = False,
) -> KNNResult:
    """Let the k train samples of largest cosine vote with weight exp(cosine / temperature).

    Similarities are computed in blocks of test rows, in float32 or, for float64 features, float64;
    votes are summed in float64.

    Args:
        train_features: [N, D]; rows are brought to unit length here.
        train_labels: [N] integers in [0, C).
        test_features: [M, D].
        num_classes: C; None: the largest train label plus 1.
        k: neighbours, at most N.
        temperature: of the votes.
        weighting: "distance" as above, or "uniform": every neighbour counts 1.
        standardize: first subtract the train mean and divide by the train standard deviation
            (unbiased, plus 1e-5) per dimension, as MAE-CT's evaluation does; DINO's does not.

    Raises:
        ValueError: features not finite [N, D] and [M, D] of equal D; a zero row; labels not [N]
            integers in [0, C); k outside [1, N]; a temperature below 1/700; unknown weighting.
    """
    _check_features(train_features, "train_features")
    _check_features(test_features, "test_features")
    if test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test_features has {test_features.shape[1]} dimensions and train_features "
            f"{train_features.shape[1]}; both must come from the same encoder"
        )
    N = train_features.shape[0]
    if not 1 <= k <= N:
        raise ValueError(f"k is {k}, but there are {N} train samples; use 1..{N}")
    if not temperature >= MIN_TEMPERATURE:
        raise ValueError(f"temperature is {temperature}; it must be at least 1/700, 0.07 is usual")
    if weighting not in ("distance", "uniform"):
        raise ValueError(f"weighting is {weighting!r}; use 'distance' or 'uniform'")
    labels = _check_labels(train_labels, N, num_classes).to(train_features.device)
    C = int(labels.max()) + 1 if num_classes is None else num_classes
    train, test = train_features.detach(), test_features.detach().to(train_features.device)
    if standardize:
        train, test = _standardize(train, test)
    train, test = _unit_rows(train, "train_features"), _unit_rows(test, "test_features")
    scores, neighbors = [], []
    for rows in torch.split(test, max(1, BLOCK_ENTRIES // N)):
        similarity, index = (rows @ train.T).topk(k, dim=1)
        votes = similarity.double() / temperature
        votes = votes.exp() if weighting == "distance" else torch.ones_like(votes)
        scores.append(votes.new_zeros(len(rows), C).scatter_add_(1, labels[index], votes))
        neighbors.append(index)
    score = torch.cat(scores)
    return KNNResult(_first_largest(score), score, torch.cat(neighbors))


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    standardize: bool = False,
) -> float:
    """Share of test samples that ``knn_classify`` gets right, in [0, 1].

    Args and errors as ``knn_classify``; ``test_labels`` [M] integers may hold classes that the
    train set lacks, which count as wrong.
    """
    if test_labels.shape != test_features.shape[:1] or test_labels.is_floating_point():
        raise ValueError(
            f"test_labels has shape {list(test_labels.shape)} and dtype {test_labels.dtype}; it "
            f"must hold {test_features.shape[0]} integers"
        )
    result = knn_classify(
        train_features,
        train_labels,
        test_features,
        k=k,
        temperature=temperature,
        standardize=standardize,
    )
    right = result.predictions == test_labels.to(result.predictions.device)
    return int(right.sum()) / len(right)


def _first_largest(scores: Tensor) -> Tensor:
    """Column of each row's maximum, the first among equals: argmax leaves that open on a GPU."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    is_largest = scores == scores.amax(1, keepdim=True)
    return torch.where(is_largest, columns, scores.shape[1]).amin(1)


def _standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = train.mean(0), train.std(0) + 1e-5
    return (train - mean) / std, (test - mean) / std


def _unit_rows(features: Tensor, name: str) -> Tensor:
    exact = features if features.dtype == torch.float64 else features.float()
    norms = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    zero = int((norms == 0).sum())
    if zero:
        raise ValueError(f"{name} holds {zero} zero rows, which have no direction; remove them")
    unit: Tensor = exact / norms
    return unit


def _check_features(features: Tensor, name: str) -> None:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} has shape {list(features.shape)}; it must be [N, D], not empty")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name} holds a non-finite value; the encoder has diverged")


def _check_labels(labels: Tensor, count: int, num_classes: int | None) -> Tensor:
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"train_labels has shape {list(labels.shape)} and dtype {labels.dtype}; it must hold "
            f"{count} integers"
        )
    largest = int(labels.max())
    if int(labels.min()) < 0 or (num_classes is not None and largest >= num_classes):
        raise ValueError(
            f"train_labels lies in [{int(labels.min())}, {largest}], but num_classes is "
            f"{num_classes}; labels are 0..num_classes - 1"
        )
    return labels.long()
