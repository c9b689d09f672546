"""Accuracy of the nearest other image of the same set: no train set, no vote, no parameter.

Source: TransFusion, arXiv 2403.18681, "unsupervised test accuracy".
Letters: N samples, D dimensions. Cost: O(N^2 D) in blocks, float64.
"""

import torch
from torch import Tensor

from ctune.evaluate.accuracy import first_largest
from ctune.evaluate.inputs import check_features, check_labels, directions

BLOCK_ROWS = 512
# Distances of equal rows differ by rounding: this close, relative to the longest row, they are one.
SAME = 2.0**-40


def nearest_neighbor_accuracy(features: Tensor, labels: Tensor, *, normalize: bool = True) -> float:
    """Share of samples whose nearest other sample, by Euclidean distance, has the same label.

    A sample itself is left out by its index; among equally near ones the lowest index counts.

    Args:
        features: [N, D], N >= 2.
        labels: [N] integers.
        normalize: bring rows to unit length first (the order is then the cosine's); zero rows stay.

    Raises:
        ValueError: features not finite [N, D] with N >= 2; labels not [N] integers.
    """
    X = check_features(features, min_rows=2).double()
    y = check_labels(labels, len(X)).to(X.device)
    X = directions(X) if normalize else X
    N = len(X)
    lengths = X.square().sum(1)
    unit = SAME * float(lengths.max().clamp(min=torch.finfo(X.dtype).tiny))
    columns = torch.arange(N, device=X.device)
    right = 0
    for start in range(0, N, BLOCK_ROWS):
        own = columns[start : start + BLOCK_ROWS]
        # |x - y|^2 but for the row's own |x|^2, in whole units
        distances = ((lengths - 2 * X[own] @ X.T) / unit).round()
        distances[own - start, own] = torch.inf
        nearest = first_largest(-distances)
        right += int((y[nearest] == y[own]).sum())
    return right / N
