"""Cluster integrity: the pseudo-code written out, exact values on a circle, guards."""

import math
import re
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ctune.evaluate.cluster_integrity import IntegritySearch, cluster_integrity

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.tensor([5, 5, 2, 2, 9, 9, 2, 5, 9, 9, 2, 5])
FEATURES = (
    2 * torch.eye(3, 6)[torch.unique(LABELS, return_inverse=True)[1]]
    + 0.7 * torch.randn(12, 6, generator=GENERATOR)
).double()


def written_out(
    features: Tensor, labels: Tensor, rank: int, initial: Tensor, search: IntegritySearch
) -> list[float]:
    """Return the values per class by the steps of the paper and of its correction, one by one."""
    X = features / features.norm(dim=1, keepdim=True)
    found = []
    for k, label in enumerate(torch.unique(labels)):
        U = torch.linalg.svd(X[labels == label])[2][:rank].T
        Z = X[labels != label]
        values = []
        for start in initial:
            u, step, best, previous = start[k], search.step_size, -math.inf, math.inf
            for _ in range(search.max_iterations):
                u = u - U @ (U.T @ u)
                u = u / u.norm()
                s = Z @ u
                i = int(s.abs().argmin())
                if search.variant == "corrected":
                    value = float(s[i].abs())
                    best = max(best, value)
                    if abs(value - previous) < search.tolerance:
                        break
                    previous = value
                    u = u + step * (1 if s[i] >= 0 else -1) * Z[i]
                    u = u / u.norm()
                else:
                    u = u + step * Z[i]
                    u = u / u.norm()
                    value = float((Z[i] @ u).abs())
                    if abs(best - value) < search.tolerance:
                        break
                    best = max(best, value)
                step *= search.step_decay
            values.append(best)
        found.append(max(values))
    return found


@pytest.mark.parametrize("variant", ["corrected", "paper"])
@pytest.mark.parametrize("tolerance", [1e-6, 1e-2])
def test_equals_the_steps_written_out(
    variant: Literal["corrected", "paper"], tolerance: float
) -> None:
    search = IntegritySearch(max_iterations=60, tolerance=tolerance, variant=variant)
    initial = torch.randn(5, 3, 6, generator=GENERATOR, dtype=torch.float64)
    given: dict[str, Any] = {"rank": 2, "search": search, "initial_directions": initial}
    found = cluster_integrity(FEATURES, LABELS, **given)
    expected = written_out(FEATURES, LABELS, 2, initial, search)
    assert found["rho_per_class"] == pytest.approx(expected, rel=1e-9)
    assert found["rho"] == min(found["rho_per_class"])
    lengths = torch.linspace(0.1, 9, 12, dtype=torch.float64)[:, None]
    scaled = cluster_integrity(lengths * FEATURES, LABELS, **given)
    assert scaled["rho_per_class"] == pytest.approx(expected, rel=1e-9)


def exact_on_a_circle(features: Tensor, labels: Tensor) -> list[float]:
    """Return the values of classes of rank 1 in three dimensions: directions form a circle."""
    X = features / features.norm(dim=1, keepdim=True)
    angles = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)[:, None]
    found = []
    for label in torch.unique(labels):
        plane = torch.linalg.svd(X[labels == label])[2][1:]
        u = angles.cos() * plane[0] + angles.sin() * plane[1]
        found.append(float((u @ X[labels != label].T).abs().amin(1).max()))
    return found


def test_corrected_is_a_tight_lower_bound_and_the_papers_is_none() -> None:
    features, labels = FEATURES[:, :3], LABELS
    exact = exact_on_a_circle(features, labels)
    found = cluster_integrity(features, labels, rank=1)["rho_per_class"]
    for value, most in zip(found, exact, strict=True):
        assert 0.97 * most < value <= most + 1e-3
    published = IntegritySearch(variant="paper")
    scored = cluster_integrity(features, labels, rank=1, search=published)["rho_per_class"]
    assert any(value > most + 0.01 for value, most in zip(scored, exact, strict=True))


def test_orthogonal_classes_are_wholly_apart_and_rank_is_what_they_span() -> None:
    features = torch.eye(4)[[0, 0, 1, 1]] * torch.tensor([1.0, 3, -2, 5])[:, None]
    labels = torch.tensor([4, 4, 1, 1])
    # float32, and a rank that no class has: what it does not span is not taken from it
    for rank in (None, 1, 3):
        found = cluster_integrity(features, labels, rank=rank)
        assert found["rho_per_class"] == pytest.approx([1, 1], abs=0.02)


def test_the_seed_decides_and_a_start_inside_the_class_recovers() -> None:
    short = IntegritySearch(max_iterations=2, num_restarts=1)
    once, again = (cluster_integrity(FEATURES, LABELS, rank=1, search=short) for _ in range(2))
    assert once == again
    other = IntegritySearch(max_iterations=2, num_restarts=1, seed=1)
    assert cluster_integrity(FEATURES, LABELS, rank=1, search=other) != once
    axes = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1]]
    given = {"rank": 1, "initial_directions": torch.eye(3)[None, :2]}
    lost = cluster_integrity(axes, torch.tensor([0, 0, 1, 1]), **given)  # type: ignore[arg-type]
    assert lost["rho_per_class"] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": torch.zeros(12, dtype=torch.int64)}, "at least 2"),
        ({"labels": LABELS[:3]}, "must hold 12 integers"),
        ({"features": FEATURES * torch.nan}, "non-finite"),
        ({"features": FEATURES * 0}, "zero rows"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 6}, "below the 6 dimensions"),
        ({"features": FEATURES[:, :4], "rank": None}, "spans all 4 dimensions"),
        ({"initial_directions": torch.ones(2, 2, 6)}, "must be [R, 3, 6]"),
        ({"initial_directions": torch.ones(0, 3, 6)}, "must be [R, 3, 6]"),
        ({"initial_directions": torch.full((1, 3, 6), torch.inf)}, "non-finite"),
    ],
)
def test_refuses(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"features": FEATURES, "labels": LABELS, "rank": 1, **changed}
    features, labels = given.pop("features"), given.pop("labels")
    with pytest.raises(ValueError, match=re.escape(message)):
        cluster_integrity(features, labels, **given)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_iterations": 0},
        {"step_size": 0.0},
        {"step_decay": 1.1},
        {"tolerance": -1.0},
        {"variant": "other"},
        {"num_restarts": 0},
    ],
)
def test_the_search_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* out of range"):
        IntegritySearch(**wrong)
