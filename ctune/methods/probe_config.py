"""Config of the stage `probe`, which several methods have. Never imports torch."""

from typing import Annotated, Literal

from pydantic import Field

from ctune.methods.base_config import PlannedStage
from ctune.samplers import RandomBatchSampler
from ctune.schema import Fraction, PositiveFloat, Schema


class ProbeConfig(Schema):
    """Linear head trained with SGD and cross-entropy on the frozen encoder (lacvit.md 2.2)."""

    lr: PositiveFloat = 0.1
    """Learning rate of SGD."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of SGD, on weight and bias."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Images per step."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Passes over the training split."""
    lr_decay_rate: Fraction = 0.2
    """r of the per-epoch cosine; the rate ends at lr · r³."""
    augment: Literal["rrc_flip", "none"] = "rrc_flip"
    """`rrc_flip`: random crop and flip each epoch. `none`: features are computed once."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest area fraction of the random crop; used with `rrc_flip`."""

    def sampler(self, num_images: int, *, seed: int = 0) -> RandomBatchSampler:
        """Return the batches of the stage: every image once per epoch."""
        batch_size = min(self.batch_size, num_images)
        return RandomBatchSampler(num_images, batch_size, seed=seed, drop_last=False)

    def planned(self, num_images: int) -> PlannedStage:
        """Return what the stage does with `num_images` training images."""
        passes = num_images * (1 if self.augment == "none" else self.epochs)
        return PlannedStage("probe", self.epochs * len(self.sampler(num_images)), passes)
