"""What attention over the images of a batch does with their classes.

Sources: arXiv 2403.18681, Definition 2 (sharpness) and its maps sorted by class; the class
statistics and the mass on positives are ours, for sharpness is decided by two single entries.
Letters: n tokens (images, or views of images), H heads, B images of two views.
Attention is what the softmax gives: ``A[i, j]`` is the share of token i's output that is j's.
"""

import math
from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor


class SortedAttention(TypedDict):
    """Result of ``sort_attention_by_class``."""

    order: Tensor
    """int64 [n]: which token stands in each place."""
    attention: Tensor


class ClassAttention(TypedDict):
    """Result of ``class_attention_statistics``."""

    same_class_mass: float
    chance_mass: float
    lift: float
    same_class_mean: float
    cross_class_mean: float


class HeadAttention(ClassAttention):
    """Result of ``attention_statistics`` for one head."""

    sharpness: float
    sharpness_off_diagonal: float
    """Of pairs of two tokens only."""


class PositiveAttention(TypedDict):
    """Result of ``positive_attention_mass``."""

    per_head: Tensor
    """[H]"""
    chance: float


def sort_attention_by_class(attention: Tensor, labels: Tensor) -> SortedAttention:
    """Return attention with rows and columns by rising label, equal ones in their order.

    Args:
        attention: [n, n].
        labels: [n] integers.

    Raises:
        ValueError: attention not finite [n, n]; labels not [n] integers.
    """
    A, y = _checked(attention, labels)
    order = y.argsort(stable=True)
    return {"order": order, "attention": A[order][:, order]}


def sharpness(attention: Tensor, labels: Tensor, *, include_diagonal: bool = True) -> float:
    """Return the least attention within a class over the largest between two classes.

    Definition 2 of arXiv 2403.18681, by which a token and itself are a pair of one class. Infinite
    where no class attends to another but all of it to itself; NaN where both are zero.

    Args:
        attention: [n, n].
        labels: [n] integers.
        include_diagonal: whether a token and itself count.

    Raises:
        ValueError: attention not finite [n, n]; labels not [n] integers; no pair of one class, or
            none of two.
    """
    A, y = _checked(attention, labels)
    same = y[:, None] == y
    within = same if include_diagonal else _off_diagonal(same)
    _check_pairs(within, same)
    least, largest = float(A[within].min()), float(A[~same].max())
    if largest == 0:
        return math.inf if least > 0 else math.nan
    return least / largest


def class_attention_statistics(attention: Tensor, labels: Tensor) -> ClassAttention:
    """Return how much attention goes to other tokens of the same class.

    ``same_class_mass``: the mean over tokens of what goes to others of its class, as a share of
    what goes to others at all (0 where that is nothing); ``chance_mass``: the same for even
    attention; ``lift``: their ratio; the two means are over ordered pairs of two tokens.

    Args:
        attention: [n, n].
        labels: [n] integers.

    Raises:
        ValueError: attention not finite [n, n]; labels not [n] integers; no pair of two tokens of
            one class, or none of two classes.
    """
    A, y = _checked(attention, labels)
    same = y[:, None] == y
    others = _off_diagonal(same)
    _check_pairs(others, same)
    A = A.double()
    to_others = A.sum(1) - A.diagonal()
    shares = (A * others).sum(1) / torch.where(to_others == 0, torch.inf, to_others)
    mass = float(shares.mean())
    chance = float(others.sum()) / (len(y) * (len(y) - 1))
    return {
        "same_class_mass": mass,
        "chance_mass": chance,
        "lift": mass / chance,
        "same_class_mean": float(A[others].mean()),
        "cross_class_mean": float(A[~same].mean()),
    }


def attention_statistics(layers: Iterable[Tensor], labels: Tensor) -> list[list[HeadAttention]]:
    """Return the class statistics and the sharpness of every head [layer][head].

    Args:
        layers: [H, n, n] each; they may be made one at a time.
        labels: [n] integers.

    Raises:
        ValueError: as ``class_attention_statistics``.
    """
    return [[_head(attention, labels) for attention in layer] for layer in layers]


def positive_attention_mass(attention: Tensor, batch_size: int) -> PositiveAttention:
    """Return the mean attention of each head from a view to the other view of the same image.

    Args:
        attention: [H, 2B, 2B], the first views before the second, both in the same order.
        batch_size: B.

    Raises:
        ValueError: attention not [H, 2B, 2B]; batch_size below 1.
    """
    n = 2 * batch_size
    if batch_size < 1 or attention.ndim != 3 or attention.shape[1:] != (n, n):
        raise ValueError(
            f"attention has shape {list(attention.shape)} with batch_size {batch_size}; it must be"
            " [H, 2B, 2B], two views of each of at least one image"
        )
    to_second = attention.diagonal(batch_size, 1, 2)
    to_first = attention.diagonal(-batch_size, 1, 2)
    mass = torch.cat([to_second, to_first], dim=1).double().mean(1)
    return {"per_head": mass, "chance": 1 / n}


def _head(attention: Tensor, labels: Tensor) -> HeadAttention:
    return {
        **class_attention_statistics(attention, labels),
        "sharpness": sharpness(attention, labels),
        "sharpness_off_diagonal": sharpness(attention, labels, include_diagonal=False),
    }


def _checked(attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention [n, n] and labels [n] on its device, without gradient."""
    if attention.ndim != 2 or attention.shape[0] != attention.shape[1]:
        raise ValueError(f"attention has shape {list(attention.shape)}; it must be [n, n]")
    if not bool(attention.isfinite().all()):
        raise ValueError("attention holds a non-finite value; the head has diverged")
    n = len(attention)
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {list(labels.shape)} and dtype {labels.dtype}; it must hold {n}"
            " integers, one per row of attention"
        )
    return attention.detach(), labels.to(attention.device)


def _off_diagonal(pairs: Tensor) -> Tensor:
    return pairs & ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)


def _check_pairs(within: Tensor, same: Tensor) -> None:
    if not bool(within.any()):
        raise ValueError("labels holds no class with two tokens; there is no same-class pair")
    if bool(same.all()):
        raise ValueError("labels holds a single class; there is no pair across classes")
