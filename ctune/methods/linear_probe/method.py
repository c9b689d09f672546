"""Linear probe: the stage `probe` alone, on the encoder as it is."""

from torch import nn

from ctune.methods.base import Program, RunContext
from ctune.methods.linear_probe.config import LinearProbeConfig
from ctune.methods.probe_stage import make_classifier, probe_plan


def build(config: LinearProbeConfig, context: RunContext) -> Program:
    """Return the program: one stage, `probe`."""
    classifier = make_classifier(
        context.encoder.embed_dim, len(context.classes), seed=context.seed
    ).to(context.device)
    modules = nn.ModuleDict({"encoder": context.encoder, "classifier": classifier})
    return Program(modules, [probe_plan(config.probe, context, classifier)])
