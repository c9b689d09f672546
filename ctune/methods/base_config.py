"""What every method's config shares: presets, data needs and checks. Never imports torch."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from ctune.manifest import DatasetSummary
from ctune.schema import Fault, JsonObject, Schema, merge_defaults

Preset = Literal["paper", "small"]
Pool = Literal["mean", "cls", "auto"]
Normalization = Literal["encoder", "dataset"]
Need = Literal["images", "labels"]


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
        small = given.get("preset", cls.model_fields["preset"].default) == "small"
        return merge_defaults(cls.SMALL, given) if small else given

    @property
    def encoder_pool(self) -> Pool:
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
