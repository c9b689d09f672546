"""MAE-CT: contrastive tuning of a masked autoencoder (arXiv 2304.10520). Never imports torch."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ctune.encoders import KnownStart
from ctune.manifest import DatasetSummary
from ctune.methods.base_config import (
    EncoderPool,
    MethodConfigBase,
    Normalization,
    PlannedStage,
    labels_faults,
)
from ctune.methods.contrastive_config import (
    GradCache,
    MicroBatchSize,
    batch_fault,
    grad_cache_problems,
    refuse_accumulation,
)
from ctune.methods.mae_config import MAE_SMALL
from ctune.methods.mae_ct.combined_config import CombinedConfig
from ctune.methods.mae_ct.stage_config import (
    NUM_VIEWS,
    HeadConfig,
    HeadInitConfig,
    PretrainingConfig,
    TuningConfig,
    averaging_momentum,
)
from ctune.methods.mae_ct.table import PUBLISHED, SMALL, Augmentation, Column, encoder_size
from ctune.samplers import RandomBatchSampler
from ctune.schema import Fault, JsonObject

HEAD = "nnclr_head"
"""Under this name a model keeps the head."""

HeadStageName = Literal["head_init", "contrastive_tuning"]
StageName = Literal["mae", HeadStageName, "combined"]
STAGES: list[StageName] = ["mae", "head_init", "contrastive_tuning"]
"""The method, in the order in which it is run."""


class MaeCTConfig(MethodConfigBase):
    """A masked autoencoder's encoder learns that an image and its nearest neighbours are alike."""

    DESCRIPTION: ClassVar[str] = "MAE-CT: contrastive tuning of a masked autoencoder, no labels"
    SMALL: ClassVar[JsonObject] = {
        "mae": {"recipe": "fb", **MAE_SMALL},
        "combined": MAE_SMALL,
        "crop_scale_min": 0.2,
        "batch_size": 256,
        "micro_batch_size": 64,
        "head_init": {"epochs": 5, "head_base_lr": 5e-4},
        "contrastive_tuning": {"base_lr": 3e-4, "layer_decay": 0.75},
        "precision": "fp32",
    }

    name: Literal["mae_ct"] = "mae_ct"
    stages: Annotated[list[StageName], Field(min_length=1)] = [*STAGES]
    """What to run, in this order: `mae` pre-trains the encoder, `head_init` trains the head on the
    frozen encoder, `contrastive_tuning` both. Without `mae` the encoder should be a masked
    autoencoder's; without `head_init` it must be the model of a job that ran it. `combined`, alone,
    is the published baseline: reconstruction and neighbours at once."""
    pool: Literal["cls", "mean", "auto"] = "auto"
    """What the encoder's vector is: its class token, or the mean of its normalised patch tokens;
    `auto`: as the head was trained with, else `mean` up to the width of ViT-B and `cls` above."""
    normalization: Normalization = "encoder"
    """Pixel mean and standard deviation: the encoder's own, or measured on the training split."""
    augmentation: Augmentation = "minimal"
    """Views of `head_init` and `contrastive_tuning`. `minimal`: crop and flip. `byol` (MAE-CT-aug):
    colours, blur, grey and solarisation too; it changes what is `auto` in `contrastive_tuning`."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest area fraction of the random crop in these views."""
    flip_prob: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of the mirror image in these views; 0 where left and right differ."""
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] | Literal["auto"] = "auto"
    """Images that are contrasted with each other, on all GPUs together; `auto`: 1024, 512 for
    encoders larger than ViT-L."""
    grad_cache: GradCache = False
    micro_batch_size: MicroBatchSize = 128
    allow_random_head: bool = False
    """Run `contrastive_tuning` with a new head where none was trained; expected to be worse."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast type of encoder and head in these stages on a GPU; similarities and loss are always
    float32."""
    mae: PretrainingConfig = PretrainingConfig()
    """Stage 1."""
    head: HeadConfig = HeadConfig()
    """The head of stages 2 and 3."""
    head_init: HeadInitConfig = HeadInitConfig()
    """Stage 2."""
    contrastive_tuning: TuningConfig = TuningConfig()
    """Stage 3."""
    combined: CombinedConfig = CombinedConfig()
    """The stage `combined`."""

    @property
    def trains_head(self) -> bool:
        """Whether a stage of the run trains the head."""
        return self.stages != ["mae"]

    @property
    def continues_head(self) -> bool:
        """Whether the run goes on with a head that was trained before."""
        return bool(self.head_stages) and "head_init" not in self.stages

    @property
    def head_stages(self) -> dict[HeadStageName, HeadInitConfig | TuningConfig]:
        """The stages of the run that are about the head, in order."""
        found: dict[HeadStageName, HeadInitConfig | TuningConfig] = {
            "head_init": self.head_init,
            "contrastive_tuning": self.contrastive_tuning,
        }
        return {name: stage for name, stage in found.items() if name in self.stages}

    @property
    def encoder_pool(self) -> EncoderPool:
        """How the encoder's tokens become one vector: by the norm that the decoder saw."""
        return "cls" if self.pool == "cls" else "mean_of_normed"

    @property
    def pixel_normalization(self) -> Normalization:
        """Whose pixel mean and standard deviation are used."""
        return self.normalization

    @property
    def contrast_batches(self) -> dict[str, int]:
        """Batches that several GPUs must share equally."""
        if "combined" in self.stages:
            return {"/combined/batch_size": self.combined.batch_size}
        if not self.head_stages or self.batch_size == "auto":
            return {}
        return {"/batch_size": self.batch_size}

    def settled(self, start: KnownStart, summary: DatasetSummary | None) -> JsonObject:
        """Return what is `auto`, by size of the encoder, preset, data and the head at hand."""
        size = encoder_size(start.embed_dim)
        column = PUBLISHED[self.augmentation][size] if self.preset == "paper" else SMALL
        earlier = self._earlier(start)
        batch_size = column.batch_size if self.batch_size == "auto" else self.batch_size
        together = self.combined.batch_size if "combined" in self.stages else batch_size
        head = self._settled_head(earlier, together, summary)
        own_pool = "mean" if size == "base" else "cls"
        pool = earlier.get("pool", own_pool) if self.pool == "auto" else self.pool
        return {
            "pool": pool,
            "batch_size": batch_size,
            "mae": self.mae.settled(start),
            "combined": self.combined.settled(start),
            "head": head,
            "contrastive_tuning": self._settled_tuning(
                column, start.depth, summary, batch_size=batch_size, queue_size=head["queue_size"]
            ),
        }

    def _earlier(self, start: KnownStart) -> JsonObject:
        """Return the method that trained the head which the run goes on with, or nothing."""
        method = start.method or {}
        known = self.continues_head and method.get("name") == self.name
        return method if known and HEAD in (start.heads or ()) else {}

    def _settled_head(
        self, earlier: JsonObject, batch_size: int, summary: DatasetSummary | None
    ) -> JsonObject:
        paper = self.preset == "paper"
        widths = {
            "proj_hidden_dim": 2048 if paper else 512,
            "pred_hidden_dim": 4096 if paper else 1024,
            "out_dim": 256 if paper else 128,
            "queue_size": "auto",
        }
        if summary is not None:
            limit = min(65536 if paper else 4096, summary.splits.get("train", 0) // 2)
            widths["queue_size"] = max(2, limit // batch_size) * batch_size
        given = self.head.model_dump()
        automatic = widths | {name: earlier["head"][name] for name in widths if earlier}
        return {n: v if given[n] == "auto" else given[n] for n, v in automatic.items()}

    def _settled_tuning(
        self,
        column: Column,
        depth: int | None,
        summary: DatasetSummary | None,
        *,
        batch_size: int,
        queue_size: int | str,
    ) -> JsonObject:
        stage = self.contrastive_tuning
        values: JsonObject = {
            name: getattr(column, name)
            for name in ("epochs", "temperature", "top_k", "target_momentum", "head_base_lr")
        }
        if depth is not None:
            values["num_frozen_blocks"] = depth // 2
        if summary is None:
            del values["top_k"]
        else:
            classes = sum(count > 0 for count in summary.train_classes.values())
            if classes:
                values["top_k"] = min(column.top_k, max(1, int(queue_size) // (3 * classes)))
            epochs = column.epochs if stage.epochs == "auto" else stage.epochs
            steps = epochs * (summary.splits.get("train", 0) // batch_size)
            if steps:
                values["ema_momentum"] = averaging_momentum(steps)
        return {name: value for name, value in values.items() if getattr(stage, name) == "auto"}

    def sampler(self, num_images: int, *, seed: int = 0) -> RandomBatchSampler:
        """Return the batches of the stages that train the head: whole ones only."""
        assert self.batch_size != "auto", "the config is resolved"
        return RandomBatchSampler(num_images, self.batch_size, seed=seed)

    def planned(self, name: StageName, num_images: int) -> PlannedStage:
        """Return what a stage does with `num_images` training images."""
        if name == "mae":
            return self.mae.planned(num_images)
        if name == "combined":
            return self.combined.planned(num_images)
        stage = self.head_stages[name]
        steps = int(stage.epochs) * len(self.sampler(num_images))
        return PlannedStage(name, steps, steps * int(self.batch_size) * NUM_VIEWS)

    def plan(self, summary: DatasetSummary) -> list[PlannedStage]:
        """Return the stages, in order."""
        num_images = len(self.train_labels(summary))
        return [self.planned(name, num_images) for name in self.stages]

    def check_start(self, start: KnownStart) -> list[Fault]:
        """Return why the head cannot be trained on: it is not there, or is another one."""
        if not self.continues_head or start.heads is None:
            return []
        if HEAD not in start.heads and self.allow_random_head:
            return []
        if HEAD not in start.heads:
            detail = (
                "stages without 'head_init' go on with the head of the model that the encoder is,"
                " but it has none. Add 'head_init', name a model of a job that ran it, or set"
                " allow_random_head."
            )
            return [Fault(pointer="/stages", code="head_missing", detail=detail)]
        method = start.method or {}
        trained = {"/pool": (method.get("pool"), self.pool)}
        for name, value in method.get("head", {}).items():
            trained[f"/head/{name}"] = (value, getattr(self.head, name))
        del trained["/head/queue_init"]
        return [
            Fault(
                pointer=pointer,
                code="head_mismatch",
                detail=f"the head was trained with {then!r}, not {now!r}. Use that or 'auto', or"
                " train a new head: add the stage 'head_init'.",
            )
            for pointer, (then, now) in trained.items()
            if now not in ("auto", then)
        ]

    def check_data(self, summary: DatasetSummary) -> list[Fault]:
        """Return what the data set lacks: whole batches, neighbours, for an oracle labels."""
        faults = super().check_data(summary)
        images = summary.splits.get("train", 0)
        if "mae" in self.stages and self.mae.batch_size != "auto":
            faults += batch_fault("/mae/batch_size", self.mae.batch_size, images)
        for pointer, batch_size in self.contrast_batches.items():
            faults += batch_fault(pointer, batch_size, images)
        for name, stage in self.head_stages.items():
            if stage.top_k != "auto" and stage.top_k >= images > 0:
                detail = (
                    f"top_k {stage.top_k} asks for more neighbours than the {images} training"
                    " images have. Lower it or add images."
                )
                pointer = f"/{name}/top_k"
                faults.append(Fault(pointer=pointer, code="top_k_exceeds_data", detail=detail))
            if stage.variant == "oracle":
                at = {"pointer": f"/{name}/variant"}
                faults += [fault.model_copy(update=at) for fault in labels_faults(summary)]
        return faults

    @model_validator(mode="before")
    @classmethod
    def _refuse_accumulation(cls, given: Any) -> Any:
        if isinstance(given, dict):
            refuse_accumulation(given, {"batch_size": 1024} | cls.defaults_for(given))
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = self._queue_problems()
        ordered = [name for name in STAGES if name in self.stages]
        if self.stages not in (ordered, ["combined"]):
            problems.append(
                f"stages {self.stages} must be in the order {STAGES}, each once, or ['combined']"
            )
        if self.batch_size != "auto":
            problems += grad_cache_problems(self.grad_cache, self.micro_batch_size, self.batch_size)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _queue_problems(self) -> list[str]:
        size = self.head.queue_size
        if size == "auto":
            return []
        problems = [
            f"head.queue_size ({size}) must be a multiple of{pointer.replace('/', ' ')} ({batch}),"
            f" such as {max(1, size // batch) * batch}: whole batches replace the oldest rows. A"
            " trained head keeps its queue_size, so fit the batch to it"
            for pointer, batch in self.contrast_batches.items()
            if size % batch
        ]
        problems += [
            f"head.queue_size ({size}) must be above {name}.top_k ({stage.top_k})"
            for name, stage in self.head_stages.items()
            if stage.top_k != "auto" and stage.top_k >= size
        ]
        return problems
