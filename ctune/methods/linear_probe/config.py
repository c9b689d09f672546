"""Linear probe: a linear classifier on the frozen encoder. Never imports torch."""

from typing import ClassVar, Literal

from ctune.manifest import DatasetSummary
from ctune.methods.base_config import MethodConfigBase, PlannedStage
from ctune.methods.probe_config import ProbeConfig
from ctune.schema import JsonObject


class LinearProbeConfig(MethodConfigBase):
    """Train a linear classifier on the frozen encoder: what the encoder is worth as it is."""

    DESCRIPTION: ClassVar[str] = "Linear classifier on the frozen encoder (evaluation only)"
    NEEDS = ("images", "labels")
    SMALL: ClassVar[JsonObject] = {"probe": {"augment": "none"}}

    name: Literal["linear_probe"] = "linear_probe"
    probe: ProbeConfig = ProbeConfig()
    """The linear head."""

    def plan(self, summary: DatasetSummary) -> list[PlannedStage]:
        """Return the one stage."""
        return [self.probe.planned(len(self.train_labels(summary)))]
