"""Config of the stage `combined`: reconstruction and neighbours at once. Never imports torch."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from ctune.methods.base_config import PlannedStage
from ctune.methods.mae_config import MaePretrainConfig
from ctune.schema import PositiveFloat


class CombinedConfig(MaePretrainConfig):
    """Masked-autoencoder pre-training with the loss of the neighbours added (mae_ct.md 4): the
    published baseline that MAE-CT is better than. The optimizer's settings hold for the head too.
    """

    recipe: Literal["fb", "jku"] = "jku"
    """Whose published warm-up `auto` stands for: `fb`, of facebookresearch/mae, or `jku`, of
    ml-jku/MAE-CT, half as long."""
    num_views: Annotated[int, Field(ge=2, le=2)] = 2
    """Crops of each image in a batch, each with its own mask; the head compares the two."""
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 1024
    """Images that are contrasted with each other, on all GPUs together."""
    accumulate_steps: Annotated[int, Field(ge=1, le=1)] = 1
    """Always 1: accumulated batches do not meet in the loss of the neighbours."""
    nnclr_weight: PositiveFloat = 1e-3
    """Factor of the loss of the neighbours, beside 1 for the reconstruction; not published."""
    detach_head: bool = False
    """Let the head learn without teaching the encoder: it then shows what the features hold."""

    def planned(self, num_images: int) -> PlannedStage:
        """Return what the stage does with `num_images` training images."""
        return replace(super().planned(num_images), name="combined")
