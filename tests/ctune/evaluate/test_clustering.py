"""Clusters against classes: known answers, relabelling, degenerate inputs, guards."""

import re
from typing import Any

import pytest
import torch

from ctune.evaluate.clustering import (
    cluster_accuracy,
    clustering_scores,
    davies_bouldin_score,
    kmeans,
    kmeans_runs,
    silhouette_score,
)

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
PAIRS = torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 1]])
FEATURES = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


def test_accuracy_by_hand() -> None:
    clusters = torch.tensor([1, 1, 0, 0, 0, 2, 2, 2])
    assert cluster_accuracy(LABELS, clusters) == 6 / 8
    assert cluster_accuracy(LABELS, torch.zeros(8, dtype=torch.int64)) == 3 / 8
    every = torch.arange(8)
    assert cluster_accuracy(LABELS, every) == 3 / 8, "unmatched clusters are errors"


def test_scores_of_the_same_partition_under_other_names() -> None:
    renamed = torch.tensor([7, 7, 7, -2, -2, -2, 4, 4])
    assert clustering_scores(LABELS, renamed) == {
        "accuracy": 1, "nmi": pytest.approx(1), "ami": pytest.approx(1), "ari": 1,
    }  # fmt: skip
    clusters = torch.tensor([1, 1, 0, 0, 0, 2, 2, 2])
    permuted = torch.tensor([5, 9, 0])[clusters]
    assert clustering_scores(LABELS, clusters) == pytest.approx(clustering_scores(LABELS, permuted))


def test_two_pairs_are_two_clusters() -> None:
    found = kmeans(PAIRS, 2, l2_normalize=False)
    assert found.clusters[0] == found.clusters[1] != found.clusters[2] == found.clusters[3]
    assert sorted(found.centers.tolist()) == [[0, 0.5], [10, 0.5]]
    assert found.inertia == pytest.approx(1)


def test_clusters_are_numbered_as_the_start() -> None:
    for order in ([0, 2], [2, 0]):
        found = kmeans(PAIRS, 2, init=PAIRS[order], l2_normalize=False)
        assert found.clusters[order].tolist() == [0, 1]


def test_an_empty_cluster_takes_the_farthest_sample() -> None:
    x = torch.tensor([[0.0], [1.0], [9.0]])
    start = torch.tensor([[0.0], [-50.0]])
    found = kmeans(x, 2, init=start, l2_normalize=False)
    assert sorted(found.centers.flatten().tolist()) == [0.5, 9]


def test_length_of_rows_counts_only_without_normalisation() -> None:
    scale = torch.linspace(0.1, 30, 60)[:, None]
    plain, scaled = kmeans(FEATURES, 5), kmeans(FEATURES * scale, 5)
    assert torch.equal(plain.clusters, scaled.clusters)
    raw = kmeans(FEATURES * scale, 5, l2_normalize=False)
    assert not torch.equal(raw.clusters, plain.clusters)


def test_runs_are_seeded_and_the_best_comes_first() -> None:
    first, again = kmeans_runs(FEATURES, 8, num_runs=5), kmeans_runs(FEATURES, 8, num_runs=5)
    inertias = [run.inertia for run in first]
    assert inertias == sorted(inertias) == [run.inertia for run in again]
    assert inertias[0] < inertias[-1]


def test_silhouette_by_hand() -> None:
    near, far = 1.0, (10 + 101**0.5) / 2
    labels = torch.tensor([0, 0, 1, 1])
    expected = (far - near) / far
    assert silhouette_score(PAIRS, labels, l2_normalize=False) == pytest.approx(expected)
    alone = torch.tensor([[0.0, 0], [0, 1], [10, 0]])
    one = torch.tensor([0, 0, 1])
    values = [(10 - 1) / 10, (101**0.5 - 1) / 101**0.5, 0]
    assert silhouette_score(alone, one, l2_normalize=False) == pytest.approx(sum(values) / 3)


def test_davies_bouldin_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    score = davies_bouldin_score(PAIRS, labels, l2_normalize=False)
    assert score == pytest.approx((0.5 + 0.5) / 10)


def test_degenerate_features() -> None:
    same, labels = torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    assert kmeans(same, 2).inertia == pytest.approx(0)
    assert silhouette_score(same, labels) == 0
    assert davies_bouldin_score(same, labels) == 0
    every = torch.arange(6)
    assert silhouette_score(FEATURES[:6], every) == davies_bouldin_score(FEATURES[:6], every) == 0
    with_zero = FEATURES[:6].clone()
    with_zero[0] = 0
    assert -1 <= silhouette_score(with_zero, labels) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(PAIRS, 5), "num_clusters is 5, but there are 4 samples"),
        (lambda: kmeans(PAIRS, 0), "num_clusters is 0"),
        (lambda: kmeans(PAIRS * torch.nan, 2), "non-finite"),
        (lambda: kmeans(PAIRS, 2, init=PAIRS), "init has shape [4, 2]"),
        (lambda: kmeans(PAIRS, 2, max_iterations=0), "max_iterations 0"),
        (lambda: kmeans_runs(PAIRS, 2, num_runs=0), "num_runs is 0"),
        (lambda: cluster_accuracy(LABELS, LABELS[:3]), "clusters has shape [3]"),
        (lambda: cluster_accuracy(LABELS[:0], LABELS[:0]), "not empty"),
        (lambda: silhouette_score(PAIRS, torch.zeros(4).long()), "single class"),
        (lambda: davies_bouldin_score(PAIRS, torch.zeros(4).long()), "single class"),
        (lambda: silhouette_score(PAIRS, LABELS), "must hold 4 integers"),
    ],
)
def test_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
