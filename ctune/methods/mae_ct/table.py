"""MAE-CT's published settings by size of the encoder (mae_ct.md 3). Never imports torch."""

from dataclasses import dataclass
from typing import Literal

from ctune.methods.mae_config import LARGE_WIDTH

Augmentation = Literal["minimal", "byol"]
Size = Literal["base", "large", "huge"]

BASE_WIDTH = 768


@dataclass(frozen=True)
class Column:
    """What of `contrastive_tuning` and of the batches depends on size and augmentation."""

    batch_size: int
    epochs: int
    temperature: float
    top_k: int
    target_momentum: float
    head_base_lr: float


PUBLISHED: dict[Augmentation, dict[Size, Column]] = {
    "minimal": {
        "base": Column(1024, 20, 0.15, 20, 0.99, 1e-4),
        "large": Column(1024, 20, 0.2, 20, 0.99, 1e-4),
        "huge": Column(512, 30, 0.3, 20, 0.995, 1e-4),
    },
    "byol": {
        "base": Column(1024, 80, 0.15, 10, 0.99, 5e-4),
        "large": Column(1024, 40, 0.15, 10, 0.99, 5e-4),
        "huge": Column(512, 40, 0.35, 20, 0.995, 5e-4),
    },
}
SMALL = Column(256, 10, 0.15, 10, 0.99, 5e-4)
"""For a ViT of width 192 or less on 32 px images."""


def encoder_size(embed_dim: int | None) -> Size:
    """Return which column an encoder of this width belongs to; ViT-B and below, or not known: B."""
    if embed_dim is None or embed_dim <= BASE_WIDTH:
        return "base"
    return "large" if embed_dim <= LARGE_WIDTH else "huge"
