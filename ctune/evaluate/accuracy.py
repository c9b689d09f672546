"""The class of a score and top-k accuracy. Letters: n samples, C classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctune.evaluate.inputs import check_labels


def topk_accuracy(logits: Tensor, targets: Tensor, topk: Sequence[int] = (1, 5)) -> list[float]:
    """Share of targets among the k largest logits, for each k: fractions in [0, 1].

    Among equal logits the lower class index ranks first, so a constant output scores as one class.

    Args:
        logits: [n, C].
        targets: [n] integers in [0, C).
        topk: values of k in [1, C].

    Raises:
        ValueError: logits not [n, C] or empty or not finite; targets not [n] integers in [0, C);
            a k outside [1, C].
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [n, C], not empty")
    n, C = logits.shape
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits holds a non-finite value; the model has diverged")
    column = check_labels(targets, n, "targets", num_classes=C)[:, None]
    for k in topk:
        if not 1 <= k <= C:
            raise ValueError(f"topk holds {k}, but there are {C} classes; use 1..{C}")
    own = logits.gather(1, column)
    earlier = torch.arange(C, device=logits.device)[None, :] < column
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return [int((rank < k).sum()) / n for k in topk]


def first_largest(scores: Tensor) -> Tensor:
    """Column [n] of each row's largest score, the first among equals: argmax leaves that open.

    Args:
        scores: [n, C] without NaN.
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    is_largest = scores == scores.amax(1, keepdim=True)
    return torch.where(is_largest, columns, scores.shape[1]).amin(1)
