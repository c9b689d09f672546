"""Isotropy scores and cosine distributions: known values, invariances, direct formulas, guards."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ctune.evaluate import isotropy
from ctune.evaluate.isotropy import (
    class_cosine_similarity,
    isoscore,
    mean_cosine_similarity,
    partition_isotropy,
)


def features(N: int = 40, D: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, D + 1, dtype=torch.float64)
    drawn: Tensor = 0.5 + scale * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return drawn


def rotation(D: int = 6) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(features(D, D, 5))[0]
    return orthogonal


def test_partition_isotropy_of_identical_rows() -> None:
    result = partition_isotropy(features(1).expand(9, 6))
    assert result["isotropy"] == pytest.approx(math.exp(-2), rel=1e-9)
    assert result["log_z_max"] == pytest.approx(math.log(9) + 1, rel=1e-9)


def test_partition_isotropy_is_rotation_invariant_and_scale_free_when_normalised() -> None:
    X = features()
    value = partition_isotropy(X)["isotropy"]
    assert 0 < value < 1
    assert partition_isotropy(X @ rotation())["isotropy"] == pytest.approx(value, rel=1e-9)
    assert partition_isotropy(7 * X)["isotropy"] == pytest.approx(value, rel=1e-9)
    raw = partition_isotropy(X / 10, normalize=False)["isotropy"]
    turned = partition_isotropy(X @ rotation() / 10, normalize=False)["isotropy"]
    assert turned == pytest.approx(raw, rel=1e-9)
    assert raw != pytest.approx(value)


def test_partition_isotropy_of_opposite_rows_on_every_axis_is_one() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    assert partition_isotropy(torch.cat([axes, -axes]))["isotropy"] == pytest.approx(1)


def test_partition_isotropy_stays_in_log_space_for_large_raw_features() -> None:
    result = partition_isotropy(1000 * features(), normalize=False)
    assert result["isotropy"] == 0
    assert math.isfinite(result["log_z_max"])


@pytest.mark.parametrize("P", [2, 3, 10])
def test_mean_cosine_of_a_simplex(P: int) -> None:
    corners = torch.eye(P, dtype=torch.float64) - 1 / P
    assert mean_cosine_similarity(3 * corners) == pytest.approx(-1 / (P - 1), abs=1e-12)


def test_mean_cosine_is_the_mean_over_pairs_and_one_for_one_direction() -> None:
    X = features()
    unit = normalize(X, dim=1)
    rows, columns = np.triu_indices(len(X), 1)
    expected = (unit @ unit.T).numpy()[rows, columns].mean()
    assert mean_cosine_similarity(X) == pytest.approx(expected, rel=1e-12)
    ray = torch.arange(1.0, 5)[:, None] * torch.ones(4, 3)
    assert mean_cosine_similarity(ray) == pytest.approx(1)


def test_isoscore_is_zero_for_a_line_and_one_for_a_sphere() -> None:
    line = torch.linspace(-1, 2, 9, dtype=torch.float64)[:, None] * features(1)
    axes = torch.eye(5, dtype=torch.float64)
    assert isoscore(line) == pytest.approx(0, abs=1e-9)
    assert isoscore(torch.cat([axes, -axes])) == pytest.approx(1)


def test_isoscore_is_invariant_to_shift_scale_and_rotation() -> None:
    X = features()
    value = isoscore(X)
    assert 0 < value < 1
    assert isoscore(X + 5) == pytest.approx(value, rel=1e-9)
    assert isoscore(0.01 * X) == pytest.approx(value, rel=1e-9)
    assert isoscore(X @ rotation()) == pytest.approx(value, rel=1e-9)


def test_isoscore_of_k_equal_dimensions_counts_them() -> None:
    """IsoScore of variance spread over k of D dimensions is (k - 1) / (D - 1)."""
    axes = torch.eye(9, dtype=torch.float64)[:4]
    assert isoscore(torch.cat([axes, -axes])) == pytest.approx(3 / 8)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_class_cosine_equals_the_whole_matrix(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isotropy, "PAIR_BLOCK_ROWS", block)
    X, labels = features(), torch.arange(40) % 3 * 11
    unit = normalize(X, dim=1).numpy()
    rows, columns = np.triu_indices(40, 1)
    cosines = (unit @ unit.T)[rows, columns]
    same = labels.numpy()[rows] == labels.numpy()[columns]
    result = class_cosine_similarity(X, labels, num_bins=8)
    frequencies = []
    for kind, chosen in (("intra", cosines[same]), ("inter", cosines[~same])):
        histogram = np.histogram(chosen, bins=8, range=(-1, 1))[0]
        frequencies.append(histogram / len(chosen))
        values: dict[str, Any] = {k.removeprefix(f"{kind}_"): v for k, v in result.items()}
        assert values["mean"] == pytest.approx(chosen.mean(), rel=1e-12)
        assert values["std"] == pytest.approx(chosen.std(), rel=1e-12)
        assert values["count"] == len(chosen)
        assert values["histogram"] == histogram.tolist()
    assert result["gap"] == pytest.approx(result["intra_mean"] - result["inter_mean"])
    assert result["overlap"] == pytest.approx(np.minimum(*frequencies).sum())


def test_class_cosine_of_separated_classes() -> None:
    X = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [-3, 0]])
    result = class_cosine_similarity(X, torch.tensor([0, 0, 1, 1]), num_bins=4)
    assert (result["intra_mean"], result["inter_mean"], result["gap"]) == (1, -1, 2)
    assert (result["intra_std"], result["inter_std"], result["overlap"]) == (0, 0, 0)
    assert result["intra_histogram"] == [0, 0, 0, 2]
    assert result["inter_histogram"] == [4, 0, 0, 0]


def test_class_cosine_of_identical_rows_has_no_spread() -> None:
    X = features(1, 384).expand(300, 384)
    result = class_cosine_similarity(X, torch.arange(300) % 2)
    assert result["intra_std"] == pytest.approx(0, abs=1e-12)
    assert result["overlap"] == 1


def test_float32_features_are_computed_in_float64() -> None:
    X = features().float()
    assert mean_cosine_similarity(X) == mean_cosine_similarity(X.double())
    assert isoscore(X) == isoscore(X.double())


def labelled(X: Tensor) -> Any:
    return class_cosine_similarity(X, torch.arange(len(X)) % 2)


METRICS: list[Callable[[Tensor], Any]] = [
    partition_isotropy,
    mean_cosine_similarity,
    isoscore,
    labelled,
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.ones(1, 3), "features holds 1 rows"),
        (torch.ones(3), "must be [N, D]"),
        (torch.tensor([[1.0, 2], [torch.inf, 1], [0, 1]]), "non-finite"),
        (torch.tensor([[1.0, 2], [torch.nan, 1], [0, 1]]), "non-finite"),
    ],
)
def test_every_metric_refuses(metric: Callable[[Tensor], Any], X: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        metric(X)


@pytest.mark.parametrize("metric", [partition_isotropy, mean_cosine_similarity, labelled])
def test_zero_rows_are_refused_where_directions_count(metric: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match="1 zero rows"):
        metric(torch.tensor([[1.0, 2], [0, 0], [0, 1]]))


def test_isoscore_refuses_what_has_no_spread() -> None:
    with pytest.raises(ValueError, match="all the same row"):
        isoscore(features(1).expand(9, 6))
    with pytest.raises(ValueError, match="one dimension"):
        isoscore(torch.ones(4, 1))


@pytest.mark.parametrize(
    ("labels", "num_bins", "message"),
    [
        (torch.arange(40), 5, "no same-class pair"),
        (torch.zeros(40).long(), 5, "no pair across classes"),
        (torch.zeros(39).long(), 5, "must hold 40 integers"),
        (torch.zeros(40), 5, "dtype torch.float32"),
        (torch.arange(40) % 2, 0, "num_bins is 0"),
    ],
)
def test_class_cosine_refuses(labels: Tensor, num_bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_cosine_similarity(features(), labels, num_bins)
