"""How evenly features fill their space, and how far classes stand apart. All in float64.

Letters: N samples, D dimensions. Cost: O(N D^2) for the two scores that need the D x D eigenvectors
(never an N x N matrix), O(N D) for the mean cosine, O(N^2 D) in blocks for the histograms.
"""

import math
from typing import TypedDict

import torch
from torch import Tensor

from ctune.evaluate.inputs import check_features, check_labels, unit_rows

PAIR_BLOCK_ROWS = 256


class PartitionIsotropy(TypedDict):
    """Result of ``partition_isotropy``."""

    isotropy: float
    log_z_min: float
    log_z_max: float


class ClassCosineSimilarity(TypedDict):
    """Result of ``class_cosine_similarity``; std is the population's, histograms are counts."""

    intra_mean: float
    intra_std: float
    intra_count: int
    intra_histogram: list[int]
    inter_mean: float
    inter_std: float
    inter_count: int
    inter_histogram: list[int]
    gap: float
    overlap: float


def partition_isotropy(features: Tensor, normalize: bool = True) -> PartitionIsotropy:
    """min Z / max Z over the partition function Z(c) = sum_n exp(c . x_n); 1 is isotropic.

    Source: Mu & Viswanath 2018, arXiv 1702.01417, Eq. 4. Candidates c are the unit eigenvectors of
    X^T X with *both* signs, so the value does not depend on the sign the solver chose; many scripts
    use one arbitrary sign and are not comparable. Where eigenvalues repeat, the basis of their
    space is the solver's choice.

    Args:
        features: [N, D].
        normalize: give the rows unit length first; raw features of many dimensions give about 0.

    Raises:
        ValueError: features not finite [N, D] with N >= 2; a zero row that is to be normalised.
    """
    X = _unit_rows(features) if normalize else _checked(features)
    projections = X @ torch.linalg.eigh(X.T @ X).eigenvectors
    log_z = torch.cat([projections.logsumexp(0), (-projections).logsumexp(0)])
    low, high = float(log_z.min()), float(log_z.max())
    return {"isotropy": math.exp(low - high), "log_z_min": low, "log_z_max": high}


def mean_cosine_similarity(features: Tensor) -> float:
    """Mean cosine over all pairs: 0 for isotropic features, 1 for a single direction.

    Computed from the sum of the unit rows, (|sum|^2 - N) / (N (N - 1)).

    Args:
        features: [N, D].

    Raises:
        ValueError: features not finite [N, D] with N >= 2; a zero row.
    """
    X = _unit_rows(features)
    N = X.shape[0]
    return (float(X.sum(0).square().sum()) - N) / (N * (N - 1))


def isoscore(features: Tensor) -> float:
    """IsoScore: 0 when the variance lies in one dimension, 1 when it is equal in all.

    Source: Rudman et al., arXiv 2108.07344, section 4. Invariant to shift, rotation and scale.
    Contrastive tuning drives features towards C - 1 dimensions, so it may fall while other scores
    improve: never gate on it.

    Args:
        features: [N, D], D >= 2.

    Raises:
        ValueError: features not finite [N, D] with N >= 2 and D >= 2; no variance at all.
    """
    X = _checked(features)
    D = X.shape[1]
    if D < 2:
        raise ValueError("features has one dimension; IsoScore needs at least 2")
    scale = X.abs().max()
    centred = X - X.mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    if float(variances.max()) <= X.shape[0] * (1e-14 * float(scale)) ** 2:
        raise ValueError("features are all the same row: IsoScore needs variance")
    normalised = math.sqrt(D) * variances / torch.linalg.vector_norm(variances)
    defect = float(torch.linalg.vector_norm(normalised - 1)) / math.sqrt(2 * (D - math.sqrt(D)))
    fraction = (D - defect**2 * (D - math.sqrt(D))) ** 2 / D**2
    return (D * fraction - 1) / (D - 1)


def class_cosine_similarity(
    features: Tensor, labels: Tensor, num_bins: int = 50
) -> ClassCosineSimilarity:
    """Cosines of all unordered pairs, split into pairs of one class and of two.

    Histograms have ``num_bins`` equal bins on [-1, 1], the last closed on the right, and cosines
    are clipped to it. gap = intra mean - inter mean; overlap = sum over bins of the smaller of the
    two relative frequencies.

    Args:
        features: [N, D].
        labels: [N] integers.
        num_bins: at least 1.

    Raises:
        ValueError: features not finite [N, D] with N >= 2; a zero row; labels not [N] integers;
            num_bins < 1; no pair of one class, or none of two.
    """
    X, classes = _unit_rows_of_classes(features, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1")
    means, counts = _pair_means(X, classes)
    deviations, histograms = _pair_spread(X, classes, means, num_bins)
    intra, inter = (histograms[0] / counts[0], histograms[1] / counts[1])
    return {
        "intra_mean": means[0],
        "intra_std": math.sqrt(deviations[0] / counts[0]),
        "intra_count": counts[0],
        "intra_histogram": histograms[0].tolist(),
        "inter_mean": means[1],
        "inter_std": math.sqrt(deviations[1] / counts[1]),
        "inter_count": counts[1],
        "inter_histogram": histograms[1].tolist(),
        "gap": means[0] - means[1],
        "overlap": float(torch.minimum(intra, inter).sum()),
    }


def class_mean_cosines(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine over all pairs of one class and over all pairs of two, from the class sums.

    Args:
        features: [N, D].
        labels: [N] integers.

    Raises:
        ValueError: features not finite [N, D] with N >= 2; a zero row; labels not [N] integers; no
            pair of one class, or none of two.
    """
    return _pair_means(*_unit_rows_of_classes(features, labels))[0]


def _unit_rows_of_classes(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows [N, D] and the classes [N], counted from 0."""
    X = _unit_rows(features)
    checked = check_labels(labels, X.shape[0]).to(X.device)
    return X, torch.unique(checked, return_inverse=True)[1]


def _pair_means(X: Tensor, classes: Tensor) -> tuple[tuple[float, float], tuple[int, int]]:
    """Mean cosine and number of pairs within and across classes, from the class sums."""
    N = X.shape[0]
    sizes = torch.bincount(classes)
    sums = X.new_zeros(len(sizes), X.shape[1]).index_add_(0, classes, X)
    intra_count = int((sizes * (sizes - 1)).sum()) // 2
    inter_count = N * (N - 1) // 2 - intra_count
    if intra_count == 0:
        raise ValueError("labels holds no class with two samples; there is no same-class pair")
    if inter_count == 0:
        raise ValueError("labels holds a single class; there is no pair across classes")
    intra = (float(sums.square().sum()) - N) / 2
    every = (float(sums.sum(0).square().sum()) - N) / 2
    return (intra / intra_count, (every - intra) / inter_count), (intra_count, inter_count)


def _pair_spread(
    X: Tensor, classes: Tensor, means: tuple[float, float], num_bins: int
) -> tuple[list[float], list[Tensor]]:
    """Summed squared deviations and histograms within and across classes, in blocks of rows."""
    N = X.shape[0]
    edges = torch.linspace(-1, 1, num_bins + 1, dtype=X.dtype, device=X.device)[1:-1]
    deviations = [0.0, 0.0]
    histograms = [torch.zeros(num_bins, dtype=torch.int64, device=X.device) for _ in means]
    for start in range(0, N, PAIR_BLOCK_ROWS):
        rows = slice(start, min(start + PAIR_BLOCK_ROWS, N))
        cosines = (X[rows] @ X[start:].T).clamp(-1, 1)
        later = torch.ones_like(cosines, dtype=torch.bool).triu(1)
        same = classes[rows, None] == classes[None, start:]
        for i, chosen in enumerate((later & same, later & ~same)):
            values = cosines[chosen]
            deviations[i] += float((values - means[i]).square().sum())
            bins = torch.bucketize(values, edges, right=True)
            histograms[i] += torch.bincount(bins, minlength=num_bins)
    return deviations, histograms


def _unit_rows(features: Tensor) -> Tensor:
    return unit_rows(_checked(features))


def _checked(features: Tensor) -> Tensor:
    return check_features(features, min_rows=2).double()
