"""Weighted k-nearest-neighbour classification of frozen features.

Sources: Wu et al. 2018, arXiv 1805.01978, section 3.4; facebookresearch/dino, ``eval_knn.py``;
with ``standardize`` MAE-CT's evaluation, ml-jku/MAE-CT.
Letters: N train and M test samples, D dimensions, C classes, k neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ctune.evaluate.accuracy import first_largest, topk_accuracy
from ctune.evaluate.inputs import (
    check_features,
    check_labels,
    check_same_dimensions,
    directions,
)

Weighting = Literal["distance", "uniform"]

# Similarities held at a time: 64 MiB in float32.
BLOCK_ENTRIES = 2**24
# exp(1 / temperature) must stay finite in float64.
MIN_TEMPERATURE = 1 / 700


@dataclass(frozen=True)
class KNNResult:
    """Result of ``knn_classify``."""

    predictions: Tensor
    """[M] int64: class of the largest score, the lowest class among equal ones."""
    scores: Tensor
    """[M, C] float64: sum of the votes for each class."""
    neighbors: Tensor
    """[M, k] int64 rows of the train features, most similar first, the lowest among equal ones."""
    neighbor_labels: Tensor
    """[M, k] int64 classes of the neighbours."""

    def accuracy(self, labels: Tensor) -> float:
        """Share of predictions that equal labels [M]."""
        y = check_labels(labels, len(self.predictions), "test_labels").to(self.predictions.device)
        return int((self.predictions == y).sum()) / len(y)

    def topk_accuracy(self, labels: Tensor, rank: int = 5) -> float:
        """Share of labels [M] in [0, C) within the ``rank`` largest scores, k and C at most."""
        k, C = self.neighbors.shape[1], self.scores.shape[1]
        return topk_accuracy(self.scores, labels.to(self.scores.device), (min(rank, k, C),))[0]

    def purity(self, labels: Tensor) -> float:
        """Mean share of the k neighbours that carry the true label; labels [M]."""
        y = check_labels(labels, len(self.predictions), "test_labels").to(self.predictions.device)
        return float((self.neighbor_labels == y[:, None]).double().mean())


@dataclass(frozen=True)
class KNNScores:
    """Fractions of the test samples for one k."""

    top1: float
    top5: float
    """Within the min(5, k, C) best scores."""
    purity: float
    """Mean share of the k neighbours that carry the true label."""


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
    votes are summed in float64. A zero row has no direction: its similarities are 0.

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
        ValueError: features not finite [N, D] and [M, D] of equal D; labels not [N] integers in
            [0, C); k outside [1, N]; a temperature below 1/700; unknown weighting; a single train
            sample that is to be standardised.
    """
    train, labels = _check_train(train_features, train_labels, num_classes)
    C = int(labels.max()) + 1 if num_classes is None else num_classes
    _check_vote(temperature, weighting)
    similarity, neighbors = nearest_neighbors(train, test_features, k=k, standardize=standardize)
    return _vote(similarity, neighbors, labels, C, temperature=temperature, weighting=weighting)


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = (20,),
    temperature: float | None = 0.07,
    standardize: bool = False,
) -> dict[int, KNNScores]:
    """Score ``knn_classify`` for several k; the neighbours are looked up once.

    Args and errors as ``knn_classify``, with temperature None for uniform votes; ``test_labels``
    [M] integers from 0 may hold classes that the train set lacks, which count as wrong.
    """
    train, labels = _check_train(train_features, train_labels, None)
    y = check_labels(test_labels, len(test_features), "test_labels").to(labels.device)
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"test_labels holds {int(y.min())}; classes are counted from 0")
    weighting: Weighting = "distance" if temperature is not None else "uniform"
    temperature = 1.0 if temperature is None else temperature
    _check_vote(temperature, weighting)
    _check_k(min(ks), len(train))
    similarity, neighbors = nearest_neighbors(
        train, test_features, k=max(ks), standardize=standardize
    )
    C = int(torch.maximum(labels.max(), y.max())) + 1
    results = {}
    for k in ks:
        result = _vote(
            similarity[:, :k],
            neighbors[:, :k],
            labels,
            C,
            temperature=temperature,
            weighting=weighting,
        )
        results[k] = KNNScores(result.accuracy(y), result.topk_accuracy(y), result.purity(y))
    return results


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
    """Share of test samples that ``knn_classify`` gets right; args and errors as ``knn_scores``."""
    scores = knn_scores(
        train_features,
        train_labels,
        test_features,
        test_labels,
        ks=(k,),
        temperature=temperature,
        standardize=standardize,
    )
    return scores[k].top1


def nearest_neighbors(
    train_features: Tensor, test_features: Tensor, *, k: int, standardize: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosine [M, k] and train row [M, k] of each test sample's k most similar train samples.

    Most similar first, the lowest row among equal ones. Args and errors as ``knn_classify``.
    """
    train = check_features(train_features, "train_features")
    test = check_features(test_features, "test_features").to(train)
    check_same_dimensions(train, test)
    _check_k(k, len(train))
    if standardize:
        if len(train) < 2:
            raise ValueError("a single train sample has no standard deviation: standardize=False")
        mean, std = train.mean(0), train.std(0) + 1e-5
        train, test = (train - mean) / std, (test - mean) / std
    train, test = directions(train), directions(test)
    parts = [
        _most_similar(rows @ train.T, k)
        for rows in torch.split(test, max(1, BLOCK_ENTRIES // len(train)))
    ]
    return torch.cat([values for values, _ in parts]), torch.cat([index for _, index in parts])


def _vote(
    similarity: Tensor,
    neighbors: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    temperature: float,
    weighting: Weighting = "distance",
) -> KNNResult:
    votes = (similarity.double() / temperature).exp()
    if weighting == "uniform":
        votes = torch.ones_like(votes)
    voters = labels[neighbors]
    scores = votes.new_zeros(len(votes), num_classes).scatter_add_(1, voters, votes)
    return KNNResult(first_largest(scores), scores, neighbors, voters)


def _most_similar(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of each row's k largest; ties, which topk leaves open, by column."""
    values, index = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    values, index = values[:, :k], index[:, :k]
    if bool(tied.any()):
        rows, least = similarity[tied], values[tied, -1:]
        above, equal = rows > least, rows == least
        equal &= equal.cumsum(1) <= k - above.sum(1, keepdim=True)
        columns = (above | equal).nonzero()[:, 1].view(-1, k)
        ordered, order = rows.gather(1, columns).sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = ordered, columns.gather(1, order)
    return values, index


def _check_train(
    features: Tensor, labels: Tensor, num_classes: int | None
) -> tuple[Tensor, Tensor]:
    train = check_features(features, "train_features")
    checked = check_labels(labels, len(train), "train_labels", num_classes=num_classes)
    if int(checked.min()) < 0:
        raise ValueError(f"train_labels lies in [{int(checked.min())}, {int(checked.max())}]")
    return train, checked.to(train.device)


def _check_k(k: int, num_train: int) -> None:
    if not 1 <= k <= num_train:
        raise ValueError(f"k is {k}, but there are {num_train} train samples; use 1..{num_train}")


def _check_vote(temperature: float, weighting: str) -> None:
    if not temperature >= MIN_TEMPERATURE:
        raise ValueError(f"temperature is {temperature}; it must be at least 1/700, 0.07 is usual")
    if weighting not in ("distance", "uniform"):
        raise ValueError(f"weighting is {weighting!r}; use 'distance' or 'uniform'")
