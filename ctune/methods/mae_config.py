"""Config of the stage `mae`: masked-autoencoder pre-training (mae.md). Never imports torch."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ctune.encoders import KnownStart
from ctune.methods.base_config import PlannedStage
from ctune.samplers import RandomBatchSampler, steps_per_epoch
from ctune.schedules import scale_learning_rate
from ctune.schema import Fraction, JsonObject, PositiveFloat, Schema

Beta = Annotated[float, Field(gt=0, lt=1)]

LARGEST_BATCH = 1024
"""Of `auto`: a recipe's larger batch is accumulated."""
LARGE_WIDTH = 1024
"""Of ViT-L."""


@dataclass(frozen=True)
class Recipe:
    """What of the published settings differs between the two code bases (mae.md 3)."""

    batch_size: int
    """Images per optimizer step, each counted once."""
    batch_size_huge: int
    """The same for encoders wider than ViT-L."""
    num_views: int
    longest_warmup_epochs: int
    warmup_share: float


RECIPES = {
    "fb": Recipe(4096, 4096, 1, 40, 0.05),
    "jku": Recipe(1024, 512, 2, 20, 0.025),
}
MAE_SMALL: JsonObject = {
    "decoder_embed_dim": 96,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "base_lr": 1e-3,
    "batch_size": 256,
    "accumulate_steps": 1,
    "epochs": 200,
    "crop_scale_min": 0.5,
    "precision": "fp32",
}
"""What the preset `small` changes: 32 px images, a ViT of width 192 or less."""


class MaePretrainConfig(Schema):
    """Masked-autoencoder pre-training; defaults are the published recipe."""

    recipe: Literal["fb", "jku"] = "fb"
    """Whose published settings `auto` stands for. `fb`, of facebookresearch/mae: 4,096 images per
    step, one view. `jku`, of ml-jku/MAE-CT: two views of 1,024 images, 512 above ViT-L."""
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
    num_views: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = "auto"
    """Crops of each image in a batch, each with its own mask: an image is decoded once for all.
    `auto`: by `recipe`."""
    augment: Literal["rrc_flip", "pad_flip"] = "rrc_flip"
    """`rrc_flip`: random resized crop and flip. `pad_flip`, for images of up to 64 px: the image
    moved by up to 4 pixels, and flip."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest area fraction of the random crop; used with `rrc_flip`."""
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How a crop is resized."""
    flip_prob: Fraction = 0.5
    """Probability of the mirror image."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    """Images per micro-batch, all GPUs together, each counted once however many views it has;
    `auto`: by `recipe`, at most 1,024."""
    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Micro-batches per optimizer step; as good as a larger batch, for the loss is a mean. `auto`:
    so many that the batch of `recipe` is reached."""
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
    """Epochs in which the learning rate rises linearly; `auto`: a twentieth of all, at most 40; by
    the recipe `jku` half of that."""
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
        lowest_peak = self.lr or self._lr(**self._batch(is_huge=True))
        if self.min_lr > lowest_peak:
            problems.append(f"min_lr ({self.min_lr}) must not exceed lr ({lowest_peak})")
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
        """Highest learning rate of a resolved config."""
        assert self.lr is not None, "the config is resolved"
        return self.lr

    def settled(self, start: KnownStart) -> JsonObject:
        """Return what is `auto` or follows from other fields, with its values.

        An encoder whose width is not known is none wider than ViT-L.
        """
        recipe, warmup = RECIPES[self.recipe], self.warmup_epochs
        if warmup == "auto":
            warmup = min(recipe.longest_warmup_epochs, recipe.warmup_share * self.epochs)
        batch = self._batch(is_huge=(start.embed_dim or 0) > LARGE_WIDTH)
        return {**batch, "lr": self.lr or self._lr(**batch), "warmup_epochs": warmup}

    def _batch(self, *, is_huge: bool) -> dict[str, int]:
        """Return the sizes of an optimizer step for encoders wider than ViT-L, or the others."""
        recipe = RECIPES[self.recipe]
        images = recipe.batch_size_huge if is_huge else recipe.batch_size
        size = min(images, LARGEST_BATCH) if self.batch_size == "auto" else self.batch_size
        steps, views = self.accumulate_steps, self.num_views
        return {
            "batch_size": size,
            "accumulate_steps": max(1, images // size) if steps == "auto" else steps,
            "num_views": recipe.num_views if views == "auto" else views,
        }

    def _lr(self, *, batch_size: int, accumulate_steps: int, num_views: int) -> float:
        """Return the learning rate by the linear scaling rule, all views counted."""
        return scale_learning_rate(self.base_lr, batch_size * accumulate_steps * num_views)

    def sampler(self, num_images: int, *, seed: int = 0) -> RandomBatchSampler:
        """Return the batches: whole ones only; what is left over waits for the next epoch.

        Raises:
            ValueError: fewer images than one batch.
        """
        return RandomBatchSampler(num_images, int(self.batch_size), seed=seed)

    def warmup_steps(self, epoch_steps: int) -> int:
        """Return the steps of the warm-up of a resolved config; a started epoch counts in part."""
        return math.ceil(float(self.warmup_epochs) * epoch_steps)

    def planned(self, num_images: int) -> PlannedStage:
        """Return what the stage does with `num_images` training images."""
        sampler = self.sampler(num_images)
        steps = self.epochs * steps_per_epoch(sampler, int(self.accumulate_steps))
        passes = self.epochs * len(sampler) * int(self.batch_size) * int(self.num_views)
        return PlannedStage("mae", steps, passes)
