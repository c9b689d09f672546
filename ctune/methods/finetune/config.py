"""Fine-tuning with cross-entropy: what LaCViT is compared with. Never imports torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ctune.encoders import KnownStart
from ctune.manifest import DatasetSummary
from ctune.methods.base_config import MethodConfigBase, Normalization, PlannedStage, Pool
from ctune.methods.probe_config import ProbeConfig
from ctune.samplers import RandomBatchSampler, steps_per_epoch
from ctune.schedules import scale_learning_rate
from ctune.schema import Fraction, JsonObject, PositiveFloat, Schema, merge_defaults

Recipe = Literal["ce_sgd", "ce_mae", "linear"]
Alpha = Annotated[float, Field(ge=0, le=100)]

BASE_BLOCKS = 12
"""Blocks of a ViT-B; a deeper encoder is a large one to `auto`."""


class TuneConfig(Schema):
    """Encoder and linear classifier trained together; defaults are recipe `ce_sgd` as published."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: PositiveFloat | None = 0.01
    """Peak learning rate, absolute; null: `blr` · `batch_size` · `accumulate_steps` / 256."""
    blr: PositiveFloat = 5e-4
    """Learning rate of a batch of 256; used where `lr` is null."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum; used by `sgd`."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay; `adamw` leaves out 1-D parameters, position embedding and class token."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 1.0
    """Learning-rate factor per layer below the top; `auto`: 0.65, for encoders of more than 12
    blocks 0.75, from scratch 1.0."""
    lr_changes: Literal["per_epoch", "per_step"] = "per_epoch"
    """Whether the cosine goes on with every epoch or with every step; the warm-up is per step."""
    min_lr: Annotated[float, Field(ge=0)] | None = None
    """Where the cosine ends; null: at lr · `lr_decay_rate`³."""
    lr_decay_rate: Fraction = 0.2
    """r of the cosine's end lr · r³; used where `min_lr` is null."""
    warmup_epochs: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Epochs in which the learning rate rises linearly from 0; `auto`: 2, fewer in short runs."""
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 128
    """Images per micro-batch, all GPUs together; at most as many as there are."""
    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Micro-batches per optimizer step; as good as a larger batch, for the loss is a mean."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = 100
    """Passes over the training split; `auto`: 100, for encoders of more than 12 blocks 50."""
    augment: Literal["rrc_flip", "mae"] = "rrc_flip"
    """`rrc_flip`: random crop and flip. `mae`: bicubic, and RandAugment and random erasing."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest area fraction of the random crop."""
    mixup_alpha: Alpha = 0.0
    """α of mixup; 0 for none. With CutMix too, each batch gets one of them at even chances."""
    cutmix_alpha: Alpha = 0.0
    """α of CutMix; 0 for none."""
    label_smoothing: Fraction = 0.0
    """Share of the label that is spread over all classes."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the encoder during this stage."""
    head_init_std: PositiveFloat | None = None
    """Truncated normal start of the classifier's weight; null: Xavier-uniform."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest gradient norm; null for no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast type of the encoder on a GPU; the loss is always float32."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        warmup, epochs, problems = self.warmup_epochs, self.epochs, []
        if warmup != "auto" and epochs != "auto" and warmup >= epochs:
            problems.append(f"warmup_epochs ({warmup}) must be smaller than epochs ({epochs})")
        if self.min_lr is not None and self.lr is not None and self.min_lr > self.lr:
            problems.append(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def settled(self, start: KnownStart) -> JsonObject:
        """Return what is `auto` or follows from other fields, with its values."""
        large = (start.depth or 0) > BASE_BLOCKS
        values: JsonObject = {}
        if self.lr is None:
            batch = self.batch_size * self.accumulate_steps
            values["lr"] = scale_learning_rate(self.blr, batch)
        if self.layer_decay == "auto":
            pretrained = 0.75 if large else 0.65
            values["layer_decay"] = pretrained if start.pretrained else 1.0
        epochs = self.epochs
        if epochs == "auto":
            values["epochs"] = epochs = 50 if large else 100
        if self.warmup_epochs == "auto":
            values["warmup_epochs"] = min(2, epochs // 5)
        return values

    def sampler(self, num_images: int, *, seed: int = 0) -> RandomBatchSampler:
        """Return the batches of the stage: all of one size; what is left over waits an epoch."""
        return RandomBatchSampler(num_images, min(self.batch_size, num_images), seed=seed)

    def planned(self, num_images: int) -> PlannedStage:
        """Return what the stage does with `num_images` training images."""
        sampler, epochs = self.sampler(num_images), int(self.epochs)
        steps = epochs * steps_per_epoch(sampler, self.accumulate_steps)
        return PlannedStage("tune", steps, epochs * len(sampler) * sampler.batch_size)


PAPER: Mapping[str, JsonObject] = {
    "ce_sgd": {"tune": {}},
    "ce_mae": {
        "pool": "mean",
        "tune": {
            "optimizer": "adamw",
            "lr": None,
            "weight_decay": 0.05,
            "layer_decay": "auto",
            "lr_changes": "per_step",
            "min_lr": 1e-6,
            "warmup_epochs": 5,
            "batch_size": 1024,
            "epochs": "auto",
            "augment": "mae",
            "crop_scale_min": 0.08,
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
            "label_smoothing": 0.1,
            "head_init_std": 2e-5,
            "precision": "bf16",
        },
    },
    "linear": {"probe": {}},
}
SMALL: Mapping[str, JsonObject] = {
    "ce_sgd": {"pool": "mean", "tune": {"batch_size": 64, "epochs": 30, "drop_path": 0.0}},
    "ce_mae": {
        "tune": {
            "blr": 2e-3,
            "warmup_epochs": "auto",
            "batch_size": 64,
            "epochs": 30,
            "drop_path": 0.0,
            "precision": "fp32",
        }
    },
    "linear": {"pool": "mean", "probe": {"augment": "none"}},
}


class FinetuneConfig(MethodConfigBase):
    """Cross-entropy fine-tuning by one of three recipes; a recipe supplies defaults, as presets do.

    The values given win over the preset, the preset over the recipe.
    """

    DESCRIPTION: ClassVar[str] = "Cross-entropy fine-tuning of the encoder with a linear classifier"
    NEEDS = ("images", "labels")

    name: Literal["finetune"] = "finetune"
    recipe: Recipe = "ce_sgd"
    """`ce_sgd`: SGD and light views. `ce_mae`: AdamW, layer decay, strong views. `linear`: the
    encoder stays as it is."""
    pool: Pool = "auto"
    """How tokens become one vector; `auto`: the encoder's own way."""
    normalization: Normalization = "encoder"
    """Pixel mean and standard deviation: the encoder's own, or measured on the training split."""
    tune: TuneConfig | None = None
    """The stage of `ce_sgd` and `ce_mae`; null for `linear`."""
    probe: ProbeConfig | None = None
    """The stage of `linear`; null for the others."""

    @classmethod
    def defaults_for(cls, given: JsonObject) -> JsonObject:
        """Return the recipe's defaults under the preset's."""
        recipe = given.get("recipe", cls.model_fields["recipe"].default)
        if not isinstance(recipe, str) or recipe not in PAPER:
            return {}
        small = given.get("preset", cls.model_fields["preset"].default) == "small"
        return merge_defaults(PAPER[recipe], SMALL[recipe] if small else {})

    @model_validator(mode="after")
    def _has_its_stage(self) -> Self:
        used, unused = ("probe", "tune") if self.recipe == "linear" else ("tune", "probe")
        if getattr(self, used) is None or getattr(self, unused) is not None:
            raise ValueError(f"recipe {self.recipe!r} takes {used}, not {unused}")
        return self

    @property
    def encoder_pool(self) -> Pool:
        """How the encoder's tokens become one vector."""
        return self.pool

    @property
    def encoder_drop_path(self) -> float:
        """Stochastic depth of the encoder in training."""
        return self.tune.drop_path if self.tune else 0.0

    @property
    def pixel_normalization(self) -> Normalization:
        """Whose pixel mean and standard deviation are used."""
        return self.normalization

    def settled(self, start: KnownStart, summary: DatasetSummary | None) -> JsonObject:
        """Return what of the stage is `auto`, with its values for this encoder."""
        stage = self.tune.settled(start) if self.tune else {}
        return {"tune": stage} if stage else {}

    def plan(self, summary: DatasetSummary) -> list[PlannedStage]:
        """Return the one stage."""
        stage = self.tune or self.probe
        assert stage is not None, "a config has the stage of its recipe"
        return [stage.planned(len(self.train_labels(summary)))]
