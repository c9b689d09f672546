"""Top-k accuracy. Letters: n samples, C classes."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    if targets.shape != (n,) or targets.is_floating_point():
        raise ValueError(
            f"targets has shape {list(targets.shape)} and dtype {targets.dtype}; it must hold "
            f"{n} integers"
        )
    if bool((targets < 0).any()) or bool((targets >= C).any()):
        raise ValueError(f"targets points outside the {C} classes; they are 0..{C - 1}")
    for k in topk:
        if not 1 <= k <= C:
            raise ValueError(f"topk holds {k}, but there are {C} classes; use 1..{C}")
    column = targets.long()[:, None]
    own = logits.gather(1, column)
    earlier = torch.arange(C, device=logits.device)[None, :] < column
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return [int((rank < k).sum()) / n for k in topk]
