"""Linear probe: a linear classifier on the frozen encoder. Never imports torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ctune.methods.base_config import MethodConfigBase
from ctune.schema import Fraction, JsonObject, PositiveFloat, Schema


class ProbeConfig(Schema):
    """Linear head trained with SGD and cross-entropy on the frozen encoder (lacvit.md 2.2)."""

    lr: PositiveFloat = 0.1
    """Learning rate of SGD."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of SGD, on weight and bias."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Images per step."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Passes over the training split."""
    lr_decay_rate: Fraction = 0.2
    """r of the per-epoch cosine; the rate ends at lr · r³."""
    augment: Literal["rrc_flip", "none"] = "rrc_flip"
    """`rrc_flip`: random crop and flip each epoch. `none`: features are computed once."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest area fraction of the random crop; used with `rrc_flip`."""


class LinearProbeConfig(MethodConfigBase):
    """Train a linear classifier on the frozen encoder: what the encoder is worth as it is."""

    DESCRIPTION: ClassVar[str] = "Linear classifier on the frozen encoder (evaluation only)"
    NEEDS = ("images", "labels")
    SMALL: ClassVar[JsonObject] = {"probe": {"augment": "none"}}

    name: Literal["linear_probe"] = "linear_probe"
    probe: ProbeConfig = ProbeConfig()
    """The linear head."""
