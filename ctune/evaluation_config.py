"""Settings of the protocols that score an encoder. Never imports torch."""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from ctune.schema import Schema

Protocol = Literal[
    "knn",
    "linear_probe",
    "isotropy",
    "rankme",
    "classification",
    "low_shot",
    "clustering",
    "alignment_uniformity",
    "nearest_neighbor",
]
T = TypeVar("T")


def _distinct(values: list[T]) -> list[T]:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice in the list; name everything once")
    return values


Distinct = AfterValidator(_distinct)
Neighbours = Annotated[int, Field(ge=1, le=10_000)]
PROBED = frozenset({"linear_probe", "classification"})
"""Protocols that train the linear probe."""
DEFAULT_PROTOCOLS: Sequence[Protocol] = (
    "knn",
    "linear_probe",
    "isotropy",
    "rankme",
    "classification",
)


class LinearProbeEvaluation(Schema):
    """The linear probe: heads of a grid of learning rates, one chosen on held-out train images."""

    protocol: Literal["cached", "full"] = "cached"
    """`cached`: on features that are computed once. `full`: on random crops in every epoch, as
    published numbers are; encodes the training images once per epoch."""
    recipe: Literal["lacvit", "mae_ct"] = "lacvit"
    """`lacvit`: raw features, 10 rates, batch 128, 100 epochs. `mae_ct`: batch norm without
    parameters, 13 rates, batch 1024, 100 epochs, or 50 of crops."""

    @property
    def crop_epochs(self) -> int:
        """Passes over random crops of the training images; 0 for `cached`."""
        if self.protocol == "cached":
            return 0
        return 50 if self.recipe == "mae_ct" else 100


class LowShotEvaluation(Schema):
    """Logistic regression from few labelled training images."""

    shots: Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(max_length=10), Distinct] = [
        1,
        2,
        5,
    ]
    """Images per class."""
    num_splits: Annotated[int, Field(ge=1, le=100)] = 3
    """Draws of each number of images; mean and standard deviation are told."""
    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=10), Distinct] = [
        0.01,
        0.1,
    ]
    """Shares of each class's training images, one draw each."""


class ClusteringEvaluation(Schema):
    """k-means of the held-out images, with as many clusters as they have classes."""

    num_runs: Annotated[int, Field(ge=1, le=100)] = 20
    """Runs from different starts."""


class ClassificationEvaluation(Schema):
    """Accuracy per class and calibration of the trained classifier and of the linear probe."""

    num_bins: Annotated[int, Field(ge=1, le=1000)] = 15
    """Bins of confidence for the calibration error."""
