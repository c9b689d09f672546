"""Clusters of features against classes, and how well classes stand apart. scikit-learn's scores.

Letters: N samples, D dimensions, K clusters, C classes. Cost: k-means O(runs x iterations x N D K),
silhouette O(N^2 D).
"""

import warnings
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ctune.evaluate.inputs import check_features, check_labels, directions


class Clustering(NamedTuple):
    """Result of ``kmeans``."""

    clusters: Tensor
    """[N] int64 in [0, K); of an explicit start, cluster k began at its row k."""
    centers: Tensor
    """[K, D] float64."""
    inertia: float
    """Sum of the squared distances of samples to their centres."""


class ClusteringScores(TypedDict):
    """Result of ``clustering_scores``."""

    accuracy: float
    nmi: float
    ami: float
    ari: float


def kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    init: Tensor | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    l2_normalize: bool = True,
    seed: int = 0,
) -> Clustering:
    """One run of Lloyd's k-means, Euclidean, from k-means++ or given centres.

    An empty cluster takes the sample farthest from its centre.

    Args:
        features: [N, D].
        num_clusters: K, at most N.
        init: [K, D] centres to start from; None: k-means++.
        max_iterations: at most so many.
        tolerance: of the centres' move, relative to the mean variance of the dimensions.
        l2_normalize: bring rows to unit length first; zero rows stay zero.
        seed: of k-means++.

    Raises:
        ValueError: features not finite [N, D]; K outside [1, N]; init not finite [K, D].
    """
    X = _checked(features, l2_normalize)
    if not 1 <= num_clusters <= len(X):
        raise ValueError(f"num_clusters is {num_clusters}, but there are {len(X)} samples")
    if max_iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"max_iterations {max_iterations}, tolerance {tolerance}: need at least 1 and 0"
        )
    start: str | NDArray[np.float64] = "k-means++"
    if init is not None:
        start = check_features(init, "init").double().cpu().numpy()
        if start.shape != (num_clusters, X.shape[1]):
            raise ValueError(
                f"init has shape {list(start.shape)}; it must be {[num_clusters, X.shape[1]]}"
            )
    model = KMeans(
        num_clusters,
        init=start,
        n_init=1,
        max_iter=max_iterations,
        tol=tolerance,
        random_state=seed,
        algorithm="lloyd",
    )
    with warnings.catch_warnings():  # fewer distinct samples than clusters: the scores say it
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X)
    return Clustering(
        torch.from_numpy(model.labels_.astype(np.int64)),
        torch.from_numpy(model.cluster_centers_.astype(np.float64)),
        float(model.inertia_),
    )


def kmeans_runs(
    features: Tensor, num_clusters: int, *, num_runs: int = 20, l2_normalize: bool = True
) -> list[Clustering]:
    """``kmeans`` from k-means++ with the seeds 0 ... num_runs - 1, the lowest inertia first.

    Args and errors as ``kmeans``; num_runs is at least 1.
    """
    if num_runs < 1:
        raise ValueError(f"num_runs is {num_runs}; it must be at least 1")
    runs = [
        kmeans(features, num_clusters, l2_normalize=l2_normalize, seed=seed)
        for seed in range(num_runs)
    ]
    return sorted(runs, key=lambda run: run.inertia)


def cluster_accuracy(labels: Tensor, clusters: Tensor) -> float:
    """Share of samples whose class is matched with their cluster, under the best matching.

    One-to-one, Hungarian method on the table of counts; samples of unmatched clusters are errors.

    Args:
        labels: [N] integers.
        clusters: [N] integers.

    Raises:
        ValueError: not two vectors of N >= 1 integers.
    """
    counts = metrics.cluster.contingency_matrix(*_checked_pair(labels, clusters))
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return int(counts[rows, columns].sum()) / len(labels)


def clustering_scores(labels: Tensor, clusters: Tensor) -> ClusteringScores:
    """Accuracy, NMI and AMI (arithmetic averaging) and ARI of clusters against classes.

    Args and errors as ``cluster_accuracy``.
    """
    y, c = _checked_pair(labels, clusters)
    return {
        "accuracy": cluster_accuracy(labels, clusters),
        "nmi": float(metrics.normalized_mutual_info_score(y, c)),
        "ami": float(metrics.adjusted_mutual_info_score(y, c)),
        "ari": float(metrics.adjusted_rand_score(y, c)),
    }


def silhouette_score(features: Tensor, labels: Tensor, *, l2_normalize: bool = True) -> float:
    """Mean silhouette of samples among their classes, Euclidean: -1 to 1, higher is better.

    A class of one sample has silhouette 0. Source: Rousseeuw 1987.

    Args:
        features: [N, D].
        labels: [N] integers of at least 2 classes.
        l2_normalize: bring rows to unit length first; zero rows stay zero.

    Raises:
        ValueError: features not finite [N, D]; labels not [N] integers; fewer than 2 classes.
    """
    X, y = _checked_classes(features, labels, l2_normalize)
    if len(np.unique(y)) == len(y):  # which scikit-learn refuses
        return 0.0
    return float(metrics.silhouette_score(X, y))


def davies_bouldin_score(features: Tensor, labels: Tensor, *, l2_normalize: bool = True) -> float:
    """Davies-Bouldin index of the classes, Euclidean: at least 0, lower is better.

    Mean over classes of the worst (s_i + s_j) / d_ij, s the mean distance to the class's centroid
    and d the distance of two centroids. Source: Davies & Bouldin 1979.

    Args and errors as ``silhouette_score``.
    """
    X, y = _checked_classes(features, labels, l2_normalize)
    if len(np.unique(y)) == len(y):
        return 0.0
    return float(metrics.davies_bouldin_score(X, y))


def _checked(features: Tensor, l2_normalize: bool) -> NDArray[np.floating]:
    X = check_features(features)
    array: NDArray[np.floating] = (directions(X) if l2_normalize else X).cpu().numpy()
    return array


def _checked_classes(
    features: Tensor, labels: Tensor, l2_normalize: bool
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    X = _checked(features, l2_normalize)
    y: NDArray[np.int64] = check_labels(labels, len(X)).cpu().numpy()
    if len(np.unique(y)) < 2:
        raise ValueError("labels holds a single class; at least 2 are needed")
    return X, y


def _checked_pair(labels: Tensor, clusters: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels has shape {list(labels.shape)}; it must be [N], not empty")
    y, c = check_labels(labels, len(labels)), check_labels(clusters, len(labels), "clusters")
    return y.cpu().numpy(), c.cpu().numpy()
