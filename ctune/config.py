"""A whole run: encoder, method, evaluation, seed, resources, and what must fit together.

Never imports torch: the API validates with exactly these models.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ctune.encoders import EncoderConfig, check_encoder, known_start
from ctune.evaluation_config import (
    DEFAULT_PROTOCOLS,
    PROBED,
    AugmentationInvariance,
    ClassificationEvaluation,
    ClusteringEvaluation,
    Distinct,
    LinearProbeEvaluation,
    LowShotEvaluation,
    Neighbours,
    Protocol,
)
from ctune.manifest import DatasetSummary
from ctune.methods import MethodConfig
from ctune.schema import Fault, JsonObject, Schema, merge_defaults

MapKind = Literal["pca", "umap"]

LOOKS_PER_STAGE = 10
KEPT_CHECKPOINTS = 2
"""The newest ones; the last of every stage and the best of each are kept beside them."""


class OnlineConfig(Schema):
    """Looks at the encoder while it trains: k-NN, RankMe and spread of a sample of images."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Optimizer steps between two looks; `auto`: ten looks per stage; null: none."""
    max_images: Annotated[int, Field(ge=10, le=100_000)] = 1000
    """Cap on the images asked about, and again on those that vote."""
    select: Literal["last", "best"] = "last"
    """Which weights a stage hands on: its last ones, or those of the look with the best k-NN."""

    def interval_steps(self, total_steps: int) -> int | None:
        """Return the steps between two looks at a stage of so many, None for no looks."""
        auto = max(1, total_steps // LOOKS_PER_STAGE)
        return auto if self.every_steps == "auto" else self.every_steps

    @model_validator(mode="after")
    def _best_needs_looks(self) -> Self:
        if self.select == "best" and self.every_steps is None:
            raise ValueError("select 'best' needs looks; set every_steps to a number or 'auto'")
        return self


class EvaluationConfig(Schema):
    """Protocols that score the encoder on held-out images, before and after."""

    protocols: Annotated[list[Protocol], Distinct] = [*DEFAULT_PROTOCOLS]
    """What to measure; protocols that need labels are left out where there are none."""
    before: bool = True
    """Also score the untuned encoder, so that the gain is a number."""
    knn_k: Neighbours = 20
    """Neighbours that vote."""
    knn_further_k: Annotated[list[Neighbours], Field(max_length=10), Distinct] = [1, 10]
    """Further numbers of neighbours to score."""
    knn_standardized: bool = True
    """Also score features that are centred and scaled per dimension by the training images."""
    knn_temperature: Annotated[float, Field(ge=0.002, le=10)] = 0.07
    """Temperature of the votes; below 1/700 their weights would overflow."""
    knn_weighting: Literal["distance", "uniform"] = "distance"
    """`distance`: a neighbour's vote has the weight exp(cosine / temperature); `uniform`: 1."""
    max_images: Annotated[int, Field(ge=2)] = 10_000
    """Cap on the images of scores that compare them with each other, drawn with the run's seed."""
    linear_probe: LinearProbeEvaluation = LinearProbeEvaluation()
    """How the linear probe is trained."""
    low_shot: LowShotEvaluation = LowShotEvaluation()
    """How few images the low-shot classifiers get."""
    clustering: ClusteringEvaluation = ClusteringEvaluation()
    """How the clusters are found."""
    augmentation_invariance: AugmentationInvariance = AugmentationInvariance()
    """What the vectors should not depend on."""
    classification: ClassificationEvaluation = ClassificationEvaluation()
    """How predictions are judged."""
    online: OnlineConfig = OnlineConfig()
    """Scores during training."""
    map: MapKind | Annotated[list[MapKind], Field(max_length=2)] = "pca"
    """2-D maps in the report: `pca`, `umap` (slower; the worker needs `ctune[umap]`), or a list."""

    @property
    def crop_epochs(self) -> int:
        """Passes over random crops of the training images that an evaluation makes."""
        return self.linear_probe.crop_epochs if PROBED & {*self.protocols} else 0

    def tuned_images(self, num_labelled: int) -> int:
        """Training images times the passes over them of fine-tunings in an evaluation."""
        if "low_shot" not in self.protocols:
            return 0
        settings = self.low_shot
        return round(sum(settings.finetune_shares) * num_labelled * settings.finetune_epochs)

    def viewed_images(self, num_heldout: int) -> int:
        """Held-out images times their random views that an evaluation encodes."""
        if "augmentation_invariance" not in self.protocols:
            return 0
        settings = self.augmentation_invariance
        return settings.num_views * min(settings.num_images, num_heldout)

    @property
    def map_kinds(self) -> list[MapKind]:
        """The maps to make, each once."""
        return list(dict.fromkeys([self.map] if isinstance(self.map, str) else self.map))


class ResourcesConfig(Schema):
    """What the run may use."""

    gpus: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs of one worker that share every batch; 0 for the CPU, null for a GPU where the worker has
    one."""
    max_duration_s: Annotated[int, Field(ge=1)] | None = None
    """Wall-clock limit of all attempts together; null for none."""
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints inside a stage; the end of a stage always makes one."""
    compile: bool = False
    """Compile the encoder: the first steps take a minute or more, the others less time. Needs a
    C++ compiler on the machine that trains."""
    gradient_checkpointing: bool = False
    """Recompute the activations of the encoder's blocks in the backward pass: less memory, one more
    forward pass."""


class RunConfig(Schema):
    """Everything that decides the outcome of a run but the data set."""

    encoder: EncoderConfig
    method: MethodConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Same seed, data and machine: same weights, bit for bit on a CPU."""
    resources: ResourcesConfig = ResourcesConfig()


def resolve(
    config: RunConfig,
    summary: DatasetSummary | None = None,
    model_info: JsonObject | None = None,
) -> RunConfig:
    """Return `config` with every `auto` filled in that config, data and encoder decide.

    Args:
        config: as given, or resolved as far as it went.
        summary: of the data set; None leaves what depends on it.
        model_info: `model.json` of the directory that the encoder comes from, where there is one.
    """
    values: JsonObject = config.model_dump()
    settled = config.method.settled(known_start(config.encoder, model_info), summary)
    values["method"] = merge_defaults(values["method"], settled)
    return RunConfig.model_validate(values)


def check(
    config: RunConfig, summary: DatasetSummary, model_info: JsonObject | None = None
) -> list[Fault]:
    """Return every fault that shows before training: encoder, data needs, GPUs, evaluation.

    Pointers are relative to the body of POST /jobs. Arguments as `resolve`.
    """
    start = known_start(config.encoder, model_info)
    faults = [_below("/encoder", fault) for fault in check_encoder(config.encoder)]
    faults += [_below("/method", fault) for fault in config.method.check_start(start)]
    faults += [_below("/method", fault) for fault in config.method.check_data(summary)]
    faults += _share_faults(config)
    labelled = sum(count > 0 for count in summary.train_classes.values())
    if config.evaluation.online.select == "best" and labelled < 2:
        detail = "the best weights are found by k-NN, which needs 2 labelled classes; use 'last'."
        pointer = "/evaluation/online/select"
        faults.append(Fault(pointer=pointer, code="labels_needed", detail=detail))
    if not summary.splits.get("train"):
        detail = "the data set has no training images."
        faults.append(Fault(pointer="/dataset", code="no_training_images", detail=detail))
    return faults


def _share_faults(config: RunConfig) -> list[Fault]:
    gpus = config.resources.gpus or 1
    return [
        Fault(
            pointer=f"/method{pointer}",
            code="batch_not_divisible",
            detail=f"{images} images do not divide by the {gpus} GPUs of the run. Use"
            f" {max(1, images // gpus) * gpus}, or another number of GPUs.",
        )
        for pointer, images in config.method.contrast_batches.items()
        if images % gpus
    ]


def _below(prefix: str, fault: Fault) -> Fault:
    return fault.model_copy(update={"pointer": prefix + fault.pointer})
