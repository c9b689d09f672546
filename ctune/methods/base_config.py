"""What every method's config shares: presets, data needs and checks. Never imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import model_validator

from ctune.encoders import KnownStart
from ctune.manifest import DatasetSummary
from ctune.samplers import Indices
from ctune.schema import Fault, JsonObject, Schema, merge_defaults

Preset = Literal["paper", "small"]
Pool = Literal["mean", "cls", "auto"]
EncoderPool = Pool | Literal["mean_of_normed"]
Normalization = Literal["encoder", "dataset"]
Need = Literal["images", "labels"]


@dataclass(frozen=True)
class PlannedStage:
    """What a stage will do, known before anything of it exists."""

    name: str
    total_steps: int
    """Optimizer steps."""
    image_passes: int
    """Images that the encoder sees in training, every view counted."""


class MethodConfigBase(Schema):
    """Base of the method configs.

    Field defaults are the `paper` preset; `SMALL` holds what the `small` preset changes. A preset
    only supplies defaults: explicit values win.
    """

    SMALL: ClassVar[JsonObject] = {}
    NEEDS: ClassVar[Sequence[Need]] = ("images",)
    DESCRIPTION: ClassVar[str] = ""

    preset: Preset = "small"
    """`paper`: the published setting. `small`: 32 to 96 px images, a CPU or one small GPU."""

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return merge_defaults(cls.defaults_for(given), given)

    @classmethod
    def defaults_for(cls, given: JsonObject) -> JsonObject:
        """Return what lies below the values `given`, above the fields' own defaults."""
        small = given.get("preset", cls.model_fields["preset"].default) == "small"
        return cls.SMALL if small else {}

    def settled(self, start: KnownStart, summary: DatasetSummary | None) -> JsonObject:
        """Return the fields that are `auto`, with the values that they have in this run.

        Without a summary those that depend on the data stay as they are.
        """
        return {}

    @property
    def encoder_pool(self) -> EncoderPool:
        """How the encoder's tokens become one vector."""
        return "auto"

    @property
    def encoder_drop_path(self) -> float:
        """Stochastic depth of the encoder in training."""
        return 0.0

    @property
    def pixel_normalization(self) -> Normalization:
        """Whose pixel mean and standard deviation are used."""
        return "encoder"

    @property
    def contrast_batches(self) -> dict[str, int]:
        """Batches whose images are contrasted, which several GPUs must share equally.

        Pointer inside this block to images.
        """
        return {}

    def plan(self, summary: DatasetSummary) -> list[PlannedStage]:
        """Return the stages of a run on this data, in order: what `build` will plan.

        The config is resolved and `check_data` has found no fault.
        """
        raise NotImplementedError

    def train_labels(self, summary: DatasetSummary) -> Indices:
        """Return the labels [N] of the images the method trains on, -1 for none, in any order.

        The order does not matter for how many batches there are.
        """
        counts = list(summary.train_classes.values())
        labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        if "labels" in self.NEEDS:
            return labels
        unlabelled = summary.splits.get("train", 0) - len(labels)
        return np.concatenate([labels, np.full(unlabelled, -1, dtype=np.int64)])

    def check_start(self, start: KnownStart) -> list[Fault]:
        """Return why a run cannot start from this encoder; pointers start inside its block."""
        return []

    def check_data(self, summary: DatasetSummary) -> list[Fault]:
        """Return what the data set lacks for this method; pointers start inside its block."""
        if "labels" in self.NEEDS:
            return labels_faults(summary)
        return []


def labels_faults(summary: DatasetSummary) -> list[Fault]:
    """Return a fault when the training split does not hold two labelled classes or more."""
    classes = [name for name, count in summary.train_classes.items() if count > 0]
    if len(classes) >= 2:
        return []
    found = f"only the class {classes[0]!r}" if classes else "no labels"
    return [
        Fault(
            pointer="/name",
            code="labels_needed",
            detail=f"this method needs at least 2 labelled classes; the training split has {found}."
            " Upload one folder per class, or choose a method that needs no labels.",
        )
    ]
