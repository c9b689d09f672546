"""Masked-autoencoder pre-training (arXiv 2111.06377) as in mae.md: the stage `mae` alone."""

from torch import nn

from ctune.methods.base import Program, RunContext
from ctune.methods.mae.config import MaeConfig
from ctune.methods.mae_stage import mae_plan


def build(config: MaeConfig, context: RunContext) -> Program:
    """Return the program: one stage, `mae`.

    Raises:
        ConfigError: the encoder is no vision transformer with a class token; the mask_ratio hides
            none or all of its patches.
    """
    plan, modules = mae_plan(config.mae, context)
    return Program(nn.ModuleDict({"encoder": context.encoder, **modules}), [plan])
