"""Masked-autoencoder pre-training. Never imports torch."""

from typing import ClassVar, Literal

from ctune.encoders import KnownStart
from ctune.manifest import DatasetSummary
from ctune.methods.base_config import EncoderPool, MethodConfigBase, Normalization, PlannedStage
from ctune.methods.contrastive_config import batch_fault
from ctune.methods.mae_config import MAE_SMALL, MaePretrainConfig
from ctune.schema import Fault, JsonObject


class MaeConfig(MethodConfigBase):
    """A vision transformer learns to fill in the hidden patches of images."""

    DESCRIPTION: ClassVar[str] = "Masked autoencoder: pre-training without labels"
    SMALL: ClassVar[JsonObject] = {"mae": MAE_SMALL}

    name: Literal["mae"] = "mae"
    pool: Literal["cls", "mean"] = "cls"
    """What the encoder's vector is: its class token, or the mean of its normalised patch tokens.
    The training does not depend on it."""
    normalization: Normalization = "encoder"
    """Pixel mean and standard deviation: the encoder's own, or measured on the training split."""
    mae: MaePretrainConfig = MaePretrainConfig()
    """The one stage."""

    @property
    def encoder_pool(self) -> EncoderPool:
        """How the encoder's tokens become one vector: by the norm that the decoder saw."""
        return "cls" if self.pool == "cls" else "mean_of_normed"

    @property
    def pixel_normalization(self) -> Normalization:
        """Whose pixel mean and standard deviation are used."""
        return self.normalization

    def settled(self, start: KnownStart, summary: DatasetSummary | None) -> JsonObject:
        """Return batches, learning rate and warm-up where they are automatic."""
        return {"mae": self.mae.settled(start)}

    def plan(self, summary: DatasetSummary) -> list[PlannedStage]:
        """Return the one stage."""
        return [self.mae.planned(len(self.train_labels(summary)))]

    def check_data(self, summary: DatasetSummary) -> list[Fault]:
        """Return what the data set lacks: a whole batch of images."""
        images = summary.splits.get("train", 0)
        size, faults = self.mae.batch_size, super().check_data(summary)
        return faults if size == "auto" else faults + batch_fault("/mae/batch_size", size, images)
