"""LaCViT: label-aware contrastive fine-tuning (arXiv 2303.18013). Never imports torch."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ctune.manifest import DatasetSummary
from ctune.methods.base_config import MethodConfigBase, Normalization, Pool
from ctune.methods.probe_config import ProbeConfig
from ctune.schema import Fault, Fraction, JsonObject, PositiveFloat, Schema

Jitter = Annotated[float, Field(ge=0, le=10)]


class ContrastiveConfig(Schema):
    """Stage 1: all of the encoder and a projection head, supervised contrastive loss."""

    loss: Literal["supcon"] = "supcon"
    """Contrastive loss: images of one class attract each other."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.1
    """τ: divides the cosine similarities."""
    base_temperature: PositiveFloat | None = 0.07
    """τ_b: the loss is multiplied by τ/τ_b; null for the paper's form (factor 1)."""
    contrast_mode: Literal["all", "one"] = "all"
    """Anchors: every view, or each image's first view."""
    num_views: Annotated[int, Field(ge=1, le=8)] = 2
    """Augmented views per image; 1 only with class-balanced batches."""
    projection_kind: Literal["mlp", "linear", "none"] = "mlp"
    """Projection head between encoder and loss."""
    projection_dim: Annotated[int, Field(ge=2, le=8192)] = 128
    """Dimensions of the projected vectors."""
    projection_hidden_dim: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Hidden width of the MLP head; null for the encoder's width."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest area fraction of the random resized crop."""
    color_jitter: tuple[Jitter, Jitter, Jitter, Annotated[float, Field(ge=0, le=0.5)]] = (
        0.4,
        0.4,
        0.4,
        0.1,
    )
    """Strength of brightness, contrast, saturation and hue changes."""
    color_jitter_prob: Fraction = 0.8
    """Probability that a view's colours are changed."""
    grayscale_prob: Fraction = 0.2
    """Probability that a view is made grey."""
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 128
    """Images per micro-batch; each gives `num_views` views."""
    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] = 32
    """Micro-batches per optimizer step. This does not enlarge the contrast set."""
    batch_sampler: Literal["auto", "random", "class_balanced"] = "random"
    """`auto`: random while 95 % of the anchors find another image of their class, else balanced."""
    samples_per_class: Annotated[int, Field(ge=1, le=10_000)] = 4
    """K: images per class in a class-balanced batch; divides the batch."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate, absolute."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum; used by `sgd`."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay; `adamw` leaves out 1-D parameters, position embedding and class token."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 1.0
    """Learning-rate factor per layer below the top; `auto`: 0.75 pretrained, 1.0 from scratch."""
    lr_decay_rate: Fraction = 1e-4
    """r of the per-epoch cosine; the rate ends at lr · r³."""
    warmup_epochs: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Epochs in which the learning rate rises linearly from 0; `auto`: 2, fewer in short runs."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 500
    """Passes over the training split."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the encoder during this stage."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest gradient norm; null for no clipping."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast type of encoder and head on a GPU; the loss is always float32."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.warmup_epochs != "auto" and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must be smaller than epochs ({self.epochs})"
            )
        balanced = self.batch_sampler == "class_balanced"
        if self.num_views == 1 and not (balanced and self.samples_per_class >= 2):
            raise ValueError(
                "num_views 1 leaves anchors without positives; use num_views 2, or batch_sampler"
                " 'class_balanced' with samples_per_class of at least 2"
            )
        if balanced and self.batch_size % self.samples_per_class:
            raise ValueError(
                f"samples_per_class ({self.samples_per_class}) must divide batch_size"
                f" ({self.batch_size})"
            )
        return self


class LaCViTConfig(MethodConfigBase):
    """Label-aware contrastive tuning, then a linear classifier on the frozen encoder."""

    DESCRIPTION: ClassVar[str] = "Label-aware contrastive fine-tuning of a vision transformer"
    NEEDS = ("images", "labels")
    SMALL: ClassVar[JsonObject] = {
        "pool": "mean",
        "contrastive": {
            "projection_dim": 64,
            "batch_size": 64,
            "accumulate_steps": 1,
            "batch_sampler": "auto",
            "optimizer": "adamw",
            "lr": 5e-4,
            "weight_decay": 0.05,
            "layer_decay": "auto",
            "warmup_epochs": "auto",
            "epochs": 30,
            "drop_path": 0.0,
            "clip_grad_norm": 1.0,
            "precision": "fp32",
        },
        "probe": {"augment": "none"},
    }

    name: Literal["lacvit"] = "lacvit"
    pool: Pool = "auto"
    """How tokens become one vector; `auto`: the encoder's own way."""
    normalization: Normalization = "encoder"
    """Pixel mean and standard deviation: the encoder's own, or measured on the training split."""
    contrastive: ContrastiveConfig = ContrastiveConfig()
    """Stage 1."""
    probe: ProbeConfig = ProbeConfig()
    """Stage 2."""

    @property
    def encoder_pool(self) -> Pool:
        """How the encoder's tokens become one vector."""
        return self.pool

    @property
    def encoder_drop_path(self) -> float:
        """Stochastic depth of the encoder in stage 1."""
        return self.contrastive.drop_path

    @property
    def pixel_normalization(self) -> Normalization:
        """Whose pixel mean and standard deviation are used."""
        return self.normalization

    def check_data(self, summary: DatasetSummary) -> list[Fault]:
        """Return what the data set lacks: labels, a whole batch, classes for balanced batches."""
        faults = super().check_data(summary)
        if faults:
            return faults
        stage = self.contrastive
        if stage.batch_sampler == "class_balanced":
            classes = sum(count > 0 for count in summary.train_classes.values())
            wanted = stage.batch_size // stage.samples_per_class
            if wanted > classes:
                faults.append(
                    Fault(
                        pointer="/contrastive/samples_per_class",
                        code="too_few_classes",
                        detail=f"a batch of {stage.batch_size} with {stage.samples_per_class}"
                        f" images per class needs {wanted} classes; the training split has"
                        f" {classes}. Raise samples_per_class or lower batch_size.",
                    )
                )
        images = sum(summary.train_classes.values())
        if images < stage.batch_size:
            faults.append(
                Fault(
                    pointer="/contrastive/batch_size",
                    code="batch_larger_than_data",
                    detail=f"batch_size {stage.batch_size} exceeds the {images} labelled training"
                    " images: an epoch would have no batch. Lower batch_size or add images.",
                )
            )
        return faults
