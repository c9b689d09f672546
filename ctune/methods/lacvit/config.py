"""LaCViT: label-aware contrastive fine-tuning (arXiv 2303.18013). Never imports torch."""

from typing import Annotated, ClassVar, Literal, Self

from numpy.typing import ArrayLike
from pydantic import BeforeValidator, Field, model_validator

from ctune.encoders import KnownStart
from ctune.manifest import DatasetSummary
from ctune.methods.base_config import MethodConfigBase, Normalization, PlannedStage, Pool
from ctune.methods.contrastive_config import (
    GradCache,
    MicroBatchSize,
    batch_fault,
    grad_cache_problems,
    no_accumulation,
)
from ctune.methods.probe_config import ProbeConfig
from ctune.samplers import BatchKind, EpochBatches, contrastive_sampler, steps_per_epoch
from ctune.schema import Fault, Fraction, JsonObject, PositiveFloat, Schema, merge_defaults

Jitter = Annotated[float, Field(ge=0, le=10)]
Loss = Annotated[
    Literal["supcon", "nt_xent", "n_pair"],
    BeforeValidator(lambda name: "nt_xent" if name == "simclr" else name),
]
N_PAIR_DEFAULTS: JsonObject = {
    "num_views": 1,
    "projection_kind": "none",
    "batch_sampler": "class_balanced",
    "accumulate_steps": 1,
    "optimizer": "adam",
    "weight_decay": 1e-4,
}
"""N-pair as LaCViT's comparison runs it (lacvit.md 4)."""
PAPER_GRAD_CACHE: JsonObject = {
    "batch_size": 4096,
    "accumulate_steps": 1,
    "micro_batch_size": 128,
}
"""The published effective batch as one contrast set instead of 32 (lacvit.md 11.3)."""


class ContrastiveConfig(Schema):
    """Stage 1: all of the encoder and a projection head, contrastive loss."""

    loss: Loss = "supcon"
    """`supcon`: images of one class attract each other. `nt_xent` (or `simclr`): views of one image
    do, labels are not used. `n_pair`: pairs of one class, raw vectors."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.1
    """τ: divides the cosine similarities; not used by `n_pair`."""
    base_temperature: PositiveFloat | None = 0.07
    """τ_b: the loss is multiplied by τ/τ_b; null for the paper's form (factor 1)."""
    contrast_mode: Literal["all", "one"] = "all"
    """Anchors: every view, or each image's first view; not used by `n_pair`."""
    l2_reg: Annotated[float, Field(ge=0)] = 0.02
    """Weight of the squared norms; used by `n_pair`."""
    num_views: Annotated[int, Field(ge=1, le=8)] = 2
    """Augmented views per image; 1 only with class-balanced batches, and always with `n_pair`."""
    projection_kind: Literal["mlp", "linear", "none"] = "mlp"
    """Projection head between encoder and loss."""
    projection_dim: Annotated[int, Field(ge=2, le=8192)] = 128
    """Dimensions of the projected vectors; not used with `projection_kind` `none`."""
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
    """Images that are contrasted with each other, on all GPUs together; each gives `num_views`
    views."""
    grad_cache: GradCache = False
    micro_batch_size: MicroBatchSize = 32
    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] = 32
    """Batches per optimizer step, above 1 only in `paper`. This does not enlarge the contrast set;
    `grad_cache` does."""
    batch_sampler: BatchKind = "random"
    """`auto`: random while 95 % of the anchors find another image of their class, else balanced."""
    samples_per_class: Annotated[int, Field(ge=1, le=10_000)] = 4
    """K: images per class in a class-balanced batch; divides the batch."""
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    """Optimizer; `adam` couples the weight decay with the gradient."""
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

    @property
    def uses_labels(self) -> bool:
        """Whether the loss looks at labels."""
        return self.loss != "nt_xent"

    def sampler(self, labels: ArrayLike, *, seed: int = 0) -> EpochBatches:
        """Return the batches of the stage on training images with these labels [N]."""
        return contrastive_sampler(
            labels,
            self.batch_size,
            kind=self.batch_sampler if self.uses_labels else "random",
            samples_per_class=self.samples_per_class,
            seed=seed,
        )

    def planned(self, sampler: EpochBatches) -> PlannedStage:
        """Return what the stage does with these batches."""
        steps = self.epochs * steps_per_epoch(sampler, self.accumulate_steps)
        passes = self.epochs * len(sampler) * sampler.batch_size * self.num_views
        return PlannedStage("contrastive", steps, passes)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        problems = []
        if self.warmup_epochs != "auto" and self.warmup_epochs >= self.epochs:
            problems.append(
                f"warmup_epochs ({self.warmup_epochs}) must be smaller than epochs ({self.epochs})"
            )
        problems += grad_cache_problems(self.grad_cache, self.micro_batch_size, self.batch_size)
        balanced = self.batch_sampler == "class_balanced"
        if balanced and self.batch_size % self.samples_per_class:
            problems.append(
                f"samples_per_class ({self.samples_per_class}) must divide batch_size"
                f" ({self.batch_size})"
            )
        match self.loss:
            case "supcon":
                if self.num_views == 1 and not (balanced and self.samples_per_class >= 2):
                    problems.append(
                        "num_views 1 leaves anchors without positives; use num_views 2, or"
                        " batch_sampler 'class_balanced' with samples_per_class of at least 2"
                    )
            case "nt_xent":
                problems += self._nt_xent_problems()
            case "n_pair":
                problems += self._n_pair_problems()
        return problems

    def _nt_xent_problems(self) -> list[str]:
        problems = []
        if self.num_views == 1:
            problems.append(
                "num_views 1 leaves anchors without positives, which for loss 'nt_xent' are the"
                " other views of the image; use num_views 2"
            )
        if self.batch_sampler == "class_balanced":
            problems.append(
                "batch_sampler 'class_balanced' fills a batch with images of few classes, and loss"
                " 'nt_xent' pushes them all apart; use 'random'"
            )
        return problems

    def _n_pair_problems(self) -> list[str]:
        wanted: list[tuple[str, object, object, str]] = [
            ("num_views", self.num_views, 1, "a positive is another image of the class"),
            ("projection_kind", self.projection_kind, "none", "the vectors are taken raw"),
            ("batch_sampler", self.batch_sampler, "class_balanced", "each class needs a pair"),
        ]
        problems = [
            f"{name} must be {value!r} with loss 'n_pair', not {given!r}: {reason}"
            for name, given, value, reason in wanted
            if given != value
        ]
        if self.samples_per_class < 2:
            problems.append(
                "samples_per_class must be at least 2 with loss 'n_pair', not 1: each class needs"
                " a pair"
            )
        if self.batch_size < 2 * self.samples_per_class:
            problems.append(
                f"batch_size ({self.batch_size}) must be at least twice samples_per_class"
                f" ({self.samples_per_class}) with loss 'n_pair': another class is the negative"
            )
        return problems


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

    @classmethod
    def defaults_for(cls, given: JsonObject) -> JsonObject:
        """Add to the preset what the loss and gradient caching ask for."""
        defaults, stage = super().defaults_for(given), given.get("contrastive")
        if not isinstance(stage, dict):
            return defaults
        if stage.get("grad_cache") is True and given.get("preset") == "paper":
            defaults = merge_defaults(defaults, {"contrastive": PAPER_GRAD_CACHE})
        if stage.get("loss") == "n_pair":
            defaults = merge_defaults(defaults, {"contrastive": N_PAIR_DEFAULTS})
        return defaults

    @model_validator(mode="after")
    def _accumulates_as_published_or_not_at_all(self) -> Self:
        stage = self.contrastive
        published = self.preset == "paper" and not stage.grad_cache
        if stage.accumulate_steps > 1 and not published:
            raise ValueError(
                f"contrastive.{no_accumulation(stage.batch_size, stage.accumulate_steps)}."
                " Only preset 'paper' without grad_cache accumulates, as was published"
            )
        return self

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

    def settled(self, start: KnownStart, summary: DatasetSummary | None) -> JsonObject:
        """Return layer decay and warm-up of stage 1 where they are `auto`."""
        stage: JsonObject = {}
        if self.contrastive.layer_decay == "auto":
            stage["layer_decay"] = 0.75 if start.pretrained else 1.0
        if self.contrastive.warmup_epochs == "auto":
            stage["warmup_epochs"] = min(2, self.contrastive.epochs // 5)
        return {"contrastive": stage} if stage else {}

    def plan(self, summary: DatasetSummary) -> list[PlannedStage]:
        """Return the two stages."""
        labels = self.train_labels(summary)
        sampler = self.contrastive.sampler(labels)
        return [self.contrastive.planned(sampler), self.probe.planned(len(labels))]

    @property
    def contrast_batches(self) -> dict[str, int]:
        """Batches that several GPUs must share equally."""
        return {"/contrastive/batch_size": self.contrastive.batch_size}

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
        faults += batch_fault("/contrastive/batch_size", stage.batch_size, images)
        return faults
