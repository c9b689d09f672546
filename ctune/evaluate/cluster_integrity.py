"""How far classes stand out of each other's subspaces: cluster integrity. All in float64.

Source: arXiv 2403.18681, Definition 1 and Algorithm 1.
Letters: n samples, d dimensions, K classes, R restarts, m columns of a basis. Cost: O(R K n d) a
pass, of which there are at most ``max_iterations``.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from ctune.evaluate.accuracy import first_largest
from ctune.evaluate.inputs import check_features, check_labels, unit_rows
from ctune.seeding import make_generator
from ctune.unit_length import unit_length

RANK_TOLERANCE = 1e-10
"""Singular values below this share of the largest are zero: of numbers with twelve digits."""


class ClusterIntegrity(TypedDict):
    """Result of ``cluster_integrity``; classes by rising label."""

    rho: float
    rho_per_class: list[float]


@dataclass(frozen=True, kw_only=True)
class IntegritySearch:
    """How directions are searched for.

    ``corrected``: always an attainable value, so that it is a lower bound of the exact one.
    ``paper``: Algorithm 1 as published (there with one restart and no decay). It scores a direction
    that has left the complement of the class's subspace, which no direction need attain, and steps
    towards a sample whose product is negative, which lowers the product's size.
    """

    max_iterations: int = 300
    step_size: float = 0.3
    step_decay: float = 0.98
    """By which the step is multiplied after each pass."""
    tolerance: float = 1e-6
    """A restart ends once its value changes by less."""
    variant: Literal["corrected", "paper"] = "corrected"
    num_restarts: int = 16
    seed: int = 0
    """Of the directions that restarts begin with."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value out of range."""
        bounds = {
            "max_iterations": self.max_iterations >= 1,
            "step_size": 0 < self.step_size < math.inf,
            "step_decay": 0 < self.step_decay <= 1,
            "tolerance": 0 <= self.tolerance < math.inf,
            "variant": self.variant in ("corrected", "paper"),
            "num_restarts": self.num_restarts >= 1,
        }
        for name, within in bounds.items():
            if not within:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which is out of range")


DEFAULT_SEARCH = IntegritySearch()


def cluster_integrity(
    features: Tensor,
    labels: Tensor,
    *,
    rank: int | None,
    search: IntegritySearch = DEFAULT_SEARCH,
    initial_directions: Tensor | None = None,
) -> ClusterIntegrity:
    """Return how well the worst class can be told from the samples of all others.

    Definition 1: for class k the largest, over unit directions that are orthogonal to the class's
    subspace, of the least absolute product with a sample of another class; ``rho`` is the least of
    all classes. Rows are brought to unit length first. All restarts of all classes go side by side.

    Args:
        features: [n, d].
        labels: [n] integers.
        rank: dimensions of a class's subspace, its first right singular vectors; less where the
            class spans less. None: all that it spans, which is everything with many real features.
        search: how directions are searched for.
        initial_directions: [R, K, d], in place of drawn ones.

    Raises:
        ValueError: features not finite [n, d]; a zero row; labels not [n] integers; fewer than two
            classes; rank below 1, or a subspace of d dimensions; initial_directions not finite
            [R, K, d] with R >= 1.
    """
    checked = check_features(features)
    X = unit_rows(checked.double())
    y = check_labels(labels, len(X)).to(X.device)
    K, own = class_members(y)
    bases = _bases(X, own, rank, relative_tolerance(checked))
    if initial_directions is None:
        generator = make_generator(search.seed, "cluster_integrity")
        shape = (search.num_restarts, K, X.shape[1])
        directions = torch.randn(shape, dtype=X.dtype, generator=generator).to(X.device)
    else:
        directions = _checked_directions(initial_directions, K, X.shape[1]).to(X)
    found = _search(X, own, bases, directions, search).amax(0)
    return {"rho": float(found.min()), "rho_per_class": found.tolist()}


def class_members(labels: Tensor) -> tuple[int, Tensor]:
    """Return the number K of classes and which of [n] samples are of each: bool [K, n].

    Raises:
        ValueError: fewer than two classes.
    """
    classes = torch.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"labels holds {len(classes)} class; at least 2 are needed")
    return len(classes), classes[:, None] == labels


def relative_tolerance(features: Tensor) -> float:
    """Return the share of the largest singular value of [n, d] below which one is rounding."""
    return max(RANK_TOLERANCE, max(features.shape) * torch.finfo(features.dtype).eps)


def span_basis(rows: Tensor, tolerance: float) -> Tensor:
    """Return right singular vectors [d, m] of rows [n, d], those of the largest values first.

    Only of singular values above `tolerance` times the largest: m is the numerical rank.
    """
    _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = vectors[sizes > tolerance * sizes[0]].T
    return basis


def _bases(X: Tensor, own: Tensor, rank: int | None, tolerance: float) -> Tensor:
    """Return a basis per class, [K, d, m]; columns that a class lacks are zero."""
    d = X.shape[1]
    if rank is not None and not 1 <= rank < d:
        raise ValueError(f"rank is {rank}; it must be at least 1 and below the {d} dimensions")
    spans = [span_basis(X[members], tolerance)[:, :rank] for members in own]
    widest = max(span.shape[1] for span in spans)
    if widest == d:
        raise ValueError(
            f"a class spans all {d} dimensions, so that nothing is left; give a rank, such as 10"
        )
    bases = X.new_zeros(len(spans), d, widest)
    for basis, span in zip(bases, spans, strict=True):
        basis[:, : span.shape[1]] = span
    return bases


def _checked_directions(directions: Tensor, K: int, d: int) -> Tensor:
    if directions.ndim != 3 or directions.shape[1:] != (K, d) or not len(directions):
        raise ValueError(
            f"initial_directions has shape {list(directions.shape)}; it must be [R, {K}, {d}]"
        )
    if not bool(directions.isfinite().all()):
        raise ValueError("initial_directions holds a non-finite value")
    return directions.detach()


def _search(
    X: Tensor, own: Tensor, bases: Tensor, directions: Tensor, search: IntegritySearch
) -> Tensor:
    """Return the best value [R, K] that each restart finds for each class."""
    u, step = directions, search.step_size
    best = u.new_full(u.shape[:2], -torch.inf)
    previous = torch.full_like(best, torch.inf)
    active = torch.ones_like(best, dtype=torch.bool)
    for _ in range(search.max_iterations):
        inside = torch.einsum("rkd,kdm->rkm", u, bases)
        u = unit_length(u - torch.einsum("rkm,kdm->rkd", inside, bases))
        products = (u @ X.T).abs().masked_fill(own, torch.inf)
        nearest = X[first_largest(-products.flatten(0, 1))].view_as(u)
        product = (u * nearest).sum(2, keepdim=True)
        if search.variant == "corrected":
            value = product.squeeze(2).abs()
            best = torch.where(active, torch.maximum(best, value), best)
            active &= (value - previous).abs() >= search.tolerance
            previous = value
            u = unit_length(u + step * torch.where(product < 0, -nearest, nearest))
        else:
            u = unit_length(u + step * nearest)
            value = (u * nearest).sum(2).abs()
            active &= (best - value).abs() >= search.tolerance
            best = torch.where(active, torch.maximum(best, value), best)
        if not bool(active.any()):
            break
        step *= search.step_decay
    return best
