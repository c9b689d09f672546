"""Mixup and CutMix of whole batches with soft labels (arXiv 1710.09412, 1905.04899).

Like `timm.data.mixup.Mixup` in its mode `batch`: one λ per batch. But neighbouring rows are
partners, so that processes which each hold an even slice of a batch mix as one process would, and a
batch may be odd; and all randomness comes from the given generator.

Shapes: B images, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Mixing:
    """How images and labels are mixed; the defaults are MAE's fine-tuning recipe."""

    mixup_alpha: float = 0.8
    """λ ~ Beta(α, α) of mixup; 0: no mixup."""
    cutmix_alpha: float = 1.0
    """λ ~ Beta(α, α) of CutMix; 0: no CutMix."""
    prob: float = 1.0
    """That a batch is mixed at all."""
    switch_prob: float = 0.5
    """That a mixed batch is CutMix, where both are on."""
    label_smoothing: float = 0.1


def mix(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    num_classes: int,
    config: Mixing,
) -> tuple[Tensor, Tensor]:
    """Return mixed images [B, 3, H, W] and soft labels [B, C]; the last row of an odd B stays.

    Mixup: λ x + (1 - λ) x'. CutMix: a box of share 1 - λ of the area at a uniform place comes from
    x', and λ becomes the share that is left once the box is cut to the image.

    Args:
        images: [B, 3, H, W], the views; not changed.
        labels: [B] int64 in [0, C).
        generator: CPU generator; the same number of draws in every call.
        num_classes: C.
        config: distributions.
    """
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    mixed_wanted, cut_wanted = rng.random(2) < (config.prob, config.switch_prob)
    cut = config.cutmix_alpha > 0 and (bool(cut_wanted) or config.mixup_alpha <= 0)
    alpha = config.cutmix_alpha if cut else config.mixup_alpha
    soft = _soft_labels(labels, num_classes, config.label_smoothing)
    if not mixed_wanted or alpha <= 0:
        return images, soft
    share, centre = rng.beta(alpha, alpha), rng.random(2)
    partners = torch.arange(len(images), device=images.device) ^ 1
    partners.clamp_(max=len(images) - 1)
    others = images[partners]
    if cut:
        top, left, bottom, right = _cut_box(
            share, centre, height=images.shape[2], width=images.shape[3]
        )
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        mixed = others.lerp_(images, share)
    return mixed, soft[partners].lerp(soft, share)


def _soft_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return [B, C]: 1 - ε on the label, and ε spread over all classes."""
    return F.one_hot(labels, num_classes).float().mul_(1 - smoothing).add_(smoothing / num_classes)


def _cut_box(
    share: float, centre: np.ndarray, *, height: int, width: int
) -> tuple[int, int, int, int]:
    """Return top, left, bottom, right of a box of 1 - `share` of the area, cut to the image."""
    sides = np.array([height, width])
    half = sides * np.sqrt(1 - share) / 2
    middle = centre * sides
    top, left = np.rint(middle - half).clip(0, sides).astype(int).tolist()
    bottom, right = np.rint(middle + half).clip(0, sides).astype(int).tolist()
    return top, left, bottom, right
