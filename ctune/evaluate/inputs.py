"""What every protocol asks of features and labels. Letters: N samples, D dimensions, C classes."""

import torch
from torch import Tensor


def check_features(features: Tensor, name: str = "features", *, min_rows: int = 1) -> Tensor:
    """Return finite features [N, D] without gradient, float64 as they are, all else as float32.

    Raises:
        ValueError: features not [N, D] with N >= `min_rows` and D >= 1, or not finite.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(features.shape)}; it must be [N, D], not empty")
    if features.shape[0] < min_rows:
        raise ValueError(f"{name} holds {features.shape[0]} rows; at least {min_rows} are needed")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name} holds a non-finite value; the encoder has diverged")
    constant = features.detach()
    return constant if constant.dtype == torch.float64 else constant.float()


def check_same_dimensions(train_features: Tensor, test_features: Tensor) -> None:
    """Raise ValueError where [N, D] and [M, D] differ in D."""
    if test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test_features has {test_features.shape[1]} dimensions and train_features "
            f"{train_features.shape[1]}; both must come from the same encoder"
        )


def check_labels(
    labels: Tensor, count: int, name: str = "labels", *, num_classes: int | None = None
) -> Tensor:
    """Return labels [N] as int64.

    Raises:
        ValueError: labels not [count] integers; with `num_classes`, one outside [0, C).
    """
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"{name} has shape {list(labels.shape)} and dtype {labels.dtype}; it must hold "
            f"{count} integers"
        )
    if num_classes is not None and count:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} lies in [{low}, {high}], but num_classes is {num_classes}; labels are "
                "0..num_classes - 1"
            )
    return labels.long()


def unit_rows(features: Tensor, name: str = "features") -> Tensor:
    """Return the rows of checked features [N, D] at unit length.

    Raises:
        ValueError: a zero row.
    """
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    zero = int((norms == 0).sum())
    if zero:
        raise ValueError(f"{name} holds {zero} zero rows, which have no direction; remove them")
    unit: Tensor = features / norms
    return unit


def directions(features: Tensor) -> Tensor:
    """Return the rows of checked features [N, D] at unit length; a zero row stays zero."""
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / torch.where(norms == 0, 1, norms)
