"""The methods: their configs as one union, discriminated by name. Never imports torch."""

from typing import Annotated, get_args

from pydantic import Field

from ctune.methods.base_config import MethodConfigBase
from ctune.methods.finetune.config import FinetuneConfig
from ctune.methods.lacvit.config import LaCViTConfig
from ctune.methods.linear_probe.config import LinearProbeConfig
from ctune.methods.mae.config import MaeConfig
from ctune.methods.mae_ct.config import MaeCTConfig
from ctune.methods.simclr.config import SimCLRConfig

MethodConfig = Annotated[
    FinetuneConfig | LaCViTConfig | LinearProbeConfig | MaeConfig | MaeCTConfig | SimCLRConfig,
    Field(discriminator="name"),
]
METHOD_CONFIGS: dict[str, type[MethodConfigBase]] = {
    config.model_fields["name"].default: config for config in get_args(get_args(MethodConfig)[0])
}
