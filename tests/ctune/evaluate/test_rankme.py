"""RankMe and the spread of unit rows: known values, invariances, guards."""

import math
import re
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from ctune.evaluate.rankme import feature_spread, rankme

FEATURES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_orthogonal_rows_of_equal_length_have_full_rank() -> None:
    assert rankme(3 * torch.eye(4, 7), eps=0) == pytest.approx(4, rel=1e-12)


def test_two_singular_values() -> None:
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected = math.exp(-float((p * p.log()).sum()))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0])), eps=0) == pytest.approx(expected)


def test_rows_of_one_direction_have_rank_one_and_none_when_centred() -> None:
    row = torch.arange(1.0, 5)
    features = torch.outer(torch.tensor([1.0, 2, 3, 4]), row)
    assert rankme(features, eps=0) == pytest.approx(1, abs=1e-5)
    assert rankme(torch.ones(9, 3), eps=1e-7) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="no rank"):
        rankme(torch.ones(9, 3), center=True)


def test_does_not_depend_on_scale_rotation_order_or_shift_when_centred() -> None:
    rotation = torch.linalg.qr(FEATURES[:6]).Q
    expected = rankme(FEATURES)
    assert rankme(-7 * FEATURES @ rotation) == pytest.approx(expected)
    assert rankme(FEATURES.flip(0)) == pytest.approx(expected)
    assert rankme(FEATURES + 5, center=True) == pytest.approx(rankme(FEATURES, center=True))
    assert rankme(FEATURES + 5) < rankme(FEATURES + 5, center=True)


def test_std_of_two_opposite_rows_along_every_axis_is_one() -> None:
    features = torch.cat([torch.eye(8), -2 * torch.eye(8)])
    assert feature_spread(features) == pytest.approx(1)


def test_std_of_equal_directions_is_zero() -> None:
    assert feature_spread(torch.outer(torch.arange(1.0, 6), torch.ones(3))) == pytest.approx(
        0, abs=1e-12
    )


def test_spread_is_one_for_all_directions_and_zero_for_one() -> None:
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.randn(4000, 32, generator=generator)
    assert feature_spread(everywhere) == pytest.approx(1, abs=0.01)
    assert feature_spread(torch.ones(10, 32)) == pytest.approx(0, abs=1e-6)
    close = torch.ones(1000, 32) + 0.01 * everywhere[:1000]
    assert feature_spread(close) == pytest.approx(
        float(normalize(close).std(dim=0).mean()) * 32**0.5, rel=1e-2
    )


@pytest.mark.parametrize(
    ("function", "features", "message"),
    [
        (rankme, torch.zeros(3, 2), "no rank"),
        (rankme, torch.zeros(0, 2), "holds 0 rows"),
        (rankme, torch.ones(3), "must be [N, D]"),
        (rankme, torch.full((3, 2), torch.inf), "non-finite"),
        (lambda x: rankme(x, eps=-1.0), torch.ones(3, 2), "eps is -1.0"),
        (feature_spread, torch.ones(0, 2), "at least 1"),
        (feature_spread, torch.full((2, 2), torch.nan), "non-finite"),
    ],
)
def test_refuses(function: Any, features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function(features)
