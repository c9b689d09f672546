"""The methods: their configs as one union, discriminated by name. Never imports torch."""

from typing import Annotated

from pydantic import Field

from ctune.methods.base_config import MethodConfigBase
from ctune.methods.lacvit.config import LaCViTConfig
from ctune.methods.linear_probe.config import LinearProbeConfig

MethodConfig = Annotated[LaCViTConfig | LinearProbeConfig, Field(discriminator="name")]
METHOD_CONFIGS: dict[str, type[MethodConfigBase]] = {
    config.model_fields["name"].default: config for config in (LaCViTConfig, LinearProbeConfig)
}
