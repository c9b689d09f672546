"""SimCLR: contrast of two views of each image (transformer_head.md 2). Never imports torch."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ctune.encoders import KnownStart
from ctune.manifest import DatasetSummary
from ctune.methods.base_config import MethodConfigBase, Normalization, PlannedStage, Pool
from ctune.methods.contrastive_config import (
    GradCache,
    MicroBatchSize,
    batch_fault,
    grad_cache_problems,
    refuse_accumulation,
)
from ctune.samplers import RandomBatchSampler
from ctune.schema import Fault, Fraction, JsonObject, PositiveFloat

NUM_VIEWS = 2

Strength = Annotated[float, Field(ge=0, le=10)]
Sigma = Annotated[float, Field(gt=0, le=100)]
Optimizer = Literal["sgd", "adamw", "adam", "lars"]
AUTO_LR: dict[Optimizer, float] = {"sgd": 0.1, "adamw": 5e-4, "adam": 5e-4, "lars": 0.4}
AUTO_LR_SMALL: dict[Optimizer, float] = AUTO_LR | {"adamw": 1e-3, "adam": 1e-3}
AUTO_WEIGHT_DECAY: dict[Optimizer, float] = {
    "sgd": 1e-3,
    "adamw": 0.05,
    "adam": 1e-3,
    "lars": 1e-4,
}
"""transformer_head.md 3, for `lars` the recipe of 4.8."""


class SimCLRConfig(MethodConfigBase):
    """Encoder and projection head under NT-Xent: two views of an image find each other."""

    DESCRIPTION: ClassVar[str] = "SimCLR: contrastive training without labels"
    SMALL: ClassVar[JsonObject] = {
        "pool": "mean",
        "batch_size": 128,
        "micro_batch_size": 32,
        "epochs": 20,
        "precision": "fp32",
    }

    name: Literal["simclr"] = "simclr"
    pool: Pool = "auto"
    """How a vision transformer's tokens become one vector; `auto`: the encoder's own way."""
    normalization: Normalization = "encoder"
    """Pixel mean and standard deviation: the encoder's own, or measured on the training split."""
    projection_head: Literal["mlp", "linear", "none"] = "mlp"
    """What stands between encoder and loss; it is set aside afterwards."""
    head_hidden_dim: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Hidden width of the head `mlp`; null for the encoder's width."""
    head_norm: Literal["batch", "none"] = "batch"
    """Batch norm after both layers of the head `mlp`, or none."""
    output_dim: Annotated[int, Field(ge=2, le=8192)] = 128
    """Dimensions of the projected vectors; not used with `projection_head` `none`."""
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 0.2
    """τ: divides the cosine similarities."""
    views: Literal["simclr_cifar", "simclr"] = "simclr_cifar"
    """`simclr_cifar`: crop, flip, colours, grey, for images of up to 64 px. `simclr`: stronger
    colours and blur, for larger ones. The fields below change single values where not null."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest area fraction of the random resized crop."""
    flip_prob: Fraction | None = None
    """Probability of the mirror image; 0 where left and right differ, as in digits."""
    rotation_prob: Fraction | None = None
    """Probability that a view is turned."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] | None = None
    """Largest turn to either side, with `rotation_prob`; null: exactly 90 degrees
    counter-clockwise."""
    color_jitter: (
        tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0, le=0.5)]] | None
    ) = None
    """Strength of brightness, contrast, saturation and hue changes."""
    color_jitter_prob: Fraction | None = None
    """Probability that a view's colours are changed."""
    grayscale_prob: Fraction | None = None
    """Probability that a view is made grey."""
    blur_prob: Fraction | None = None
    """Probability that a view is blurred."""
    blur_sigma_px: tuple[Sigma, Sigma] | None = None
    """Range of the blur's standard deviation in pixels of the view, with `blur_prob`."""
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 1024
    """Images that are contrasted with each other, on all GPUs together."""
    grad_cache: GradCache = False
    micro_batch_size: MicroBatchSize = 128
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Passes over the training split."""
    optimizer: Optimizer | Literal["auto"] = "auto"
    """`auto`: `sgd` for convolutional encoders, as published, else `adamw`."""
    lr: PositiveFloat | Literal["auto"] = "auto"
    """Peak learning rate, absolute; `auto`: 0.1 with `sgd`, 0.4 with `lars`, else 0.001, in `paper`
    0.0005."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum; used by `sgd` and `lars`."""
    weight_decay: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight decay, with `sgd` and `adam` of everything, with `adamw` and `lars` not of 1-D
    parameters, position embedding and class token; `auto`: 0.05 with `adamw`, 0.0001 with `lars`,
    else 0.001."""
    lr_schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    """Per epoch: half a cosine to 0, no change, or a factor of 0.99."""
    warmup_epochs: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Epochs in which the learning rate rises linearly from 0; `auto`: a tenth of all, at most 10,
    with `adamw`, else none."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the encoder."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest gradient norm; null for no clipping."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast type of encoder and head on a GPU; the loss is always float32."""

    @property
    def encoder_pool(self) -> Pool:
        """How the encoder's tokens become one vector."""
        return self.pool

    @property
    def encoder_drop_path(self) -> float:
        """Stochastic depth of the encoder in training."""
        return self.drop_path

    @property
    def pixel_normalization(self) -> Normalization:
        """Whose pixel mean and standard deviation are used."""
        return self.normalization

    def settled(self, start: KnownStart, summary: DatasetSummary | None) -> JsonObject:
        """Return optimizer, rates and warm-up where they are `auto`."""
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "sgd" if start.patch_based is False else "adamw"
        rates = AUTO_LR_SMALL if self.preset == "small" else AUTO_LR
        warmup_epochs = min(10, self.epochs // 10) if optimizer == "adamw" else 0
        automatic: JsonObject = {
            "optimizer": optimizer,
            "lr": rates[optimizer],
            "weight_decay": AUTO_WEIGHT_DECAY[optimizer],
            "warmup_epochs": 0 if self.lr_schedule == "exponential" else warmup_epochs,
        }
        return {name: value for name, value in automatic.items() if getattr(self, name) == "auto"}

    def sampler(self, num_images: int, *, seed: int = 0) -> RandomBatchSampler:
        """Return the batches: whole ones only; what is left over waits for the next epoch."""
        return RandomBatchSampler(num_images, self.batch_size, seed=seed)

    def planned(self, num_images: int) -> PlannedStage:
        """Return what the stage does with `num_images` training images."""
        steps = self.epochs * len(self.sampler(num_images))
        return PlannedStage("contrastive", steps, steps * self.batch_size * NUM_VIEWS)

    def plan(self, summary: DatasetSummary) -> list[PlannedStage]:
        """Return the one stage."""
        return [self.planned(len(self.train_labels(summary)))]

    @property
    def contrast_batches(self) -> dict[str, int]:
        """Batches that several GPUs must share equally."""
        return {"/batch_size": self.batch_size}

    def check_data(self, summary: DatasetSummary) -> list[Fault]:
        """Return what the data set lacks: a whole batch of images."""
        images = summary.splits.get("train", 0)
        return super().check_data(summary) + batch_fault("/batch_size", self.batch_size, images)

    @model_validator(mode="before")
    @classmethod
    def _refuse_accumulation(cls, given: Any) -> Any:
        if isinstance(given, dict):
            own = {"batch_size": cls.model_fields["batch_size"].default}
            refuse_accumulation(given, own | cls.defaults_for(given))
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = grad_cache_problems(self.grad_cache, self.micro_batch_size, self.batch_size)
        if self.warmup_epochs != "auto" and self.warmup_epochs >= self.epochs:
            problems.append(
                f"warmup_epochs ({self.warmup_epochs}) must be smaller than epochs ({self.epochs})"
            )
        if self.lr_schedule == "exponential" and self.warmup_epochs not in ("auto", 0):
            problems.append("lr_schedule 'exponential' has no warm-up; set warmup_epochs to 0")
        if self.blur_sigma_px is not None and self.blur_sigma_px[0] > self.blur_sigma_px[1]:
            problems.append(f"blur_sigma_px {list(self.blur_sigma_px)} must rise")
        if problems:
            raise ValueError("; ".join(problems))
        return self
