"""Settings of the protocols that score an encoder. Never imports torch."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

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
    "augmentation_invariance",
    "color_histogram",
]
ProbeRecipe = Literal["lacvit", "mae_ct", "mae"]
_EPOCHS = {("mae_ct", "full"): 50, ("mae", "cached"): 90, ("mae", "full"): 90}
T = TypeVar("T")


def _distinct(values: list[T]) -> list[T]:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice in the list; name everything once")
    return values


Distinct = AfterValidator(_distinct)
Neighbours = Annotated[int, Field(ge=1, le=10_000)]
SplitName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
FileNames = Annotated[list[str], Field(min_length=1, max_length=200_000)]
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
    recipe: ProbeRecipe = "lacvit"
    """`lacvit`: raw features, 10 rates, batch 128. `mae_ct`: batch norm without parameters, 13
    rates, batch 1024. `mae`: batch norm without parameters, LARS at one rate, batch 16384."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] = "auto"
    """Passes over the training images; `auto`: 100, for `mae_ct` on crops 50, for `mae` 90, which
    its authors take for ViT-B (50 for ViT-L and ViT-H)."""

    @property
    def num_epochs(self) -> int:
        """Passes over the training images, `auto` filled in."""
        if self.epochs != "auto":
            return self.epochs
        return _EPOCHS.get((self.recipe, self.protocol), 100)

    @property
    def crop_epochs(self) -> int:
        """Passes over random crops of the training images; 0 for `cached`."""
        return 0 if self.protocol == "cached" else self.num_epochs


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
    finetune_shares: Annotated[
        list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=10), Distinct
    ] = []
    """Shares on which a copy of the whole encoder is fine-tuned, as published 10 % are; slow."""
    finetune_epochs: Annotated[int, Field(ge=1, le=1000)] = 50
    """Passes of a fine-tuning over its images."""
    splits: Annotated[
        dict[SplitName, Annotated[list[FileNames], Field(min_length=1, max_length=20)]],
        Field(max_length=20),
    ] = {}
    """Published splits: a name to lists of training images by file name, one list per split, as
    `{"1_shot": [["a.jpg", …], …]}`; mean and standard deviation over the lists are told."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        drawn = {*map(shots_name, self.shots), *map(share_name, self.shares)}
        drawn |= {*map(tuned_share_name, self.finetune_shares)}
        twice = sorted(drawn & self.splits.keys())
        if twice:
            raise ValueError(f"{twice[0]!r} is drawn and in splits; leave it out of one of them")
        return self


def shots_name(shots: int) -> str:
    """Return what the score of so many images per class is called."""
    return f"{shots}_shot"


def share_name(share: float) -> str:
    """Return what the score of a share of the images is called."""
    return f"{100 * share:g}_percent"


def tuned_share_name(share: float) -> str:
    """Return what the score of an encoder that was fine-tuned on a share is called."""
    return f"{share_name(share)}_finetuned"


class ClusteringEvaluation(Schema):
    """k-means of the held-out images, with as many clusters as they have classes."""

    num_runs: Annotated[int, Field(ge=1, le=100)] = 20
    """Runs from different starts."""


class AugmentationInvariance(Schema):
    """How little random views change the vectors of held-out images."""

    views: Literal["minimal", "byol"] = "minimal"
    """`minimal`: crop and flip. `byol`: changes of colour, blur and solarisation too."""
    num_views: Annotated[int, Field(ge=1, le=1000)] = 8
    """Views of each image."""
    num_images: Annotated[int, Field(ge=2, le=100_000)] = 1000
    """Cap on the images, drawn with the run's seed."""


class ClassificationEvaluation(Schema):
    """Accuracy per class and calibration of the trained classifier and of the linear probe."""

    num_bins: Annotated[int, Field(ge=1, le=1000)] = 15
    """Bins of confidence for the calibration error."""
