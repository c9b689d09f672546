"""The methods: their configs as one union, discriminated by name. Never imports torch."""

from typing import Annotated

from pydantic import Field

from ctune.methods.base_config import MethodConfigBase
from ctune.methods.finetune.config import FinetuneConfig
from ctune.methods.lacvit.config import LaCViTConfig
from ctune.methods.linear_probe.config import LinearProbeConfig
from ctune.methods.mae.config import MaeConfig
from ctune.methods.simclr.config import SimCLRConfig

MethodConfig = Annotated[
    FinetuneConfig | LaCViTConfig | LinearProbeConfig | MaeConfig | SimCLRConfig,
    Field(discriminator="name"),
]
METHOD_CONFIGS: dict[str, type[MethodConfigBase]] = {
    config.model_fields["name"].default: config
    for config in (FinetuneConfig, LaCViTConfig, LinearProbeConfig, MaeConfig, SimCLRConfig)
}
