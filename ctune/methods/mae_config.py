"""Config of the stage `mae`: masked-autoencoder pre-training (mae.md). Never imports torch."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ctune.methods.base_config import PlannedStage
from ctune.samplers import RandomBatchSampler, steps_per_epoch
from ctune.schedules import scale_learning_rate
from ctune.schema import Fraction, JsonObject, PositiveFloat, Schema

Beta = Annotated[float, Field(gt=0, lt=1)]

LONGEST_WARMUP_EPOCHS = 40
WARMUP_SHARE = 0.05
MAE_SMALL: JsonObject = {
    "decoder_embed_dim": 96,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "base_lr": 1e-3,
    "batch_size": 256,
    "epochs": 200,
    "crop_scale_min": 0.5,
    "precision": "fp32",
}
"""What the preset `small` changes: 32 px images, a ViT of width 192 or less."""


class MaePretrainConfig(Schema):
    """Masked-autoencoder pre-training; defaults are the published recipe."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that the encoder does not see."""
    mask_block: Annotated[int, Field(ge=1, le=64)] = 1
    """Patches are hidden in blocks of so many by so many; 1: each by itself."""
    norm_pix_loss: bool = True
    """Compare with each patch's pixels at mean 0 and variance 1, not as they are."""
    decoder_embed_dim: Annotated[int, Field(ge=4, le=8192, multiple_of=4)] = 512
    """Width of the decoder, a multiple of 4 and of its heads."""
    decoder_depth: Annotated[int, Field(ge=1, le=64)] = 8
    """Blocks of the decoder."""
    decoder_num_heads: Annotated[int, Field(ge=1, le=256)] = 16
    """Attention heads of the decoder."""
    num_views: Annotated[int, Field(ge=1, le=16)] = 1
    """Crops of each image in a batch, each with its own mask: an image is decoded once for all."""
    augment: Literal["rrc_flip", "pad_flip"] = "rrc_flip"
    """`rrc_flip`: random resized crop and flip. `pad_flip`, for images of up to 64 px: the image
    moved by up to 4 pixels, and flip."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest area fraction of the random crop; used with `rrc_flip`."""
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How a crop is resized."""
    flip_prob: Fraction = 0.5
    """Probability of the mirror image."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Images per micro-batch, all GPUs together, each counted once however many views it has."""
    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Micro-batches per optimizer step; as good as a larger batch, for the loss is a mean."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 800
    """Passes over the training split."""
    base_lr: PositiveFloat = 1.5e-4
    """Learning rate of a batch of 256; used where `lr` is null."""
    lr: PositiveFloat | None = None
    """Peak learning rate, absolute; null: `base_lr` · `batch_size` · `accumulate_steps` ·
    `num_views` / 256."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where the cosine ends."""
    warmup_epochs: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Epochs in which the learning rate rises linearly; `auto`: a twentieth of all, at most 40."""
    schedule_endpoints: Literal["exclusive", "inclusive"] = "exclusive"
    """`inclusive`: the first step has a rate of 0, the last one `min_lr`; `exclusive`: neither."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of AdamW; not of biases and 1-D parameters."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of AdamW's two moving averages."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast type of encoder and decoder on a GPU; the loss is always float32."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        warmup, problems = self.warmup_epochs, []
        if warmup != "auto" and warmup > self.epochs:
            problems.append(f"warmup_epochs ({warmup}) must not exceed epochs ({self.epochs})")
        if self.min_lr > self.peak_lr:
            problems.append(f"min_lr ({self.min_lr}) must not exceed lr ({self.peak_lr})")
        if self.decoder_embed_dim % self.decoder_num_heads:
            problems.append(
                f"decoder_embed_dim ({self.decoder_embed_dim}) must be a multiple of"
                f" decoder_num_heads ({self.decoder_num_heads})"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def peak_lr(self) -> float:
        """Highest learning rate: `lr`, or by the linear scaling rule with all views counted."""
        if self.lr is not None:
            return self.lr
        views = self.batch_size * self.accumulate_steps * self.num_views
        return scale_learning_rate(self.base_lr, views)

    def settled(self) -> JsonObject:
        """Return what is `auto` or follows from other fields, with its values."""
        values: JsonObject = {"lr": self.peak_lr}
        if self.warmup_epochs == "auto":
            values["warmup_epochs"] = min(LONGEST_WARMUP_EPOCHS, WARMUP_SHARE * self.epochs)
        return values

    def sampler(self, num_images: int, *, seed: int = 0) -> RandomBatchSampler:
        """Return the batches: whole ones only; what is left over waits for the next epoch.

        Raises:
            ValueError: fewer images than one batch.
        """
        return RandomBatchSampler(num_images, self.batch_size, seed=seed)

    def warmup_steps(self, epoch_steps: int) -> int:
        """Return the steps of the warm-up of a resolved config; a started epoch counts in part."""
        return math.ceil(float(self.warmup_epochs) * epoch_steps)

    def planned(self, num_images: int) -> PlannedStage:
        """Return what the stage does with `num_images` training images."""
        sampler = self.sampler(num_images)
        steps = self.epochs * steps_per_epoch(sampler, self.accumulate_steps)
        passes = self.epochs * len(sampler) * self.batch_size * self.num_views
        return PlannedStage("mae", steps, passes)
