"""What makes an encoder faster or smaller in memory, with the same outcome but for rounding."""

import copy
import os
import shutil

import torch
from torch import nn

from ctune.backbones import Encoder
from ctune.errors import ConfigError
from ctune.events import Warned
from ctune.grad_cache import has_batch_norm

CPP_COMPILERS = ("c++", "g++", "clang++")
COUNTED_TWICE = Warned(
    code="batch_norm_counted_twice",
    message="gradient checkpointing runs the encoder's batch norms twice per step: their running"
    " statistics follow the last batches more closely",
    hint="nothing, or use a method's grad_cache where it has one: it counts them once",
)


def accelerate(
    encoder: Encoder, device: torch.device, *, compile: bool, gradient_checkpointing: bool
) -> list[Warned]:
    """Prepare an encoder on its device, in place; return what it changes beside speed and memory.

    Convolutional encoders on a GPU get the channels-last memory format. Parameter names stay as
    they are.

    Args:
        encoder: on the device.
        device: where it will run.
        compile: by `torch.compile`, at its first pass; shapes that change twice are compiled as
            free ones.
        gradient_checkpointing: recompute the activations of each block in the backward pass.

    Raises:
        ConfigError: the architecture does not support checkpointing; there is no C++ compiler.
    """
    warnings = []
    if device.type == "cuda" and is_convolutional(encoder):
        encoder.to(memory_format=torch.channels_last)
    if gradient_checkpointing:
        _checkpoint_gradients(encoder)
        warnings += [COUNTED_TWICE] if has_batch_norm(encoder) else []
    if compile:
        if not any(map(shutil.which, (os.environ.get("CXX") or "c++", *CPP_COMPILERS))):
            raise ConfigError(
                "resources.compile needs a C++ compiler on the machine that trains; there is none",
                hint="set resources.compile to false, or install one of "
                + ", ".join(CPP_COMPILERS),
            )
        encoder.compile()
    return warnings


def copy_accelerated(encoder: Encoder) -> Encoder:
    """Return a copy of an encoder that `accelerate` has prepared, prepared alike."""
    copied = copy.deepcopy(encoder)
    if encoder._compiled_call_impl is not None:  # which a copy leaves out
        copied.compile()
    return copied


def is_convolutional(encoder: Encoder) -> bool:
    """Return whether an encoder works on maps of features, not on patches as tokens."""
    has_convolutions = any(isinstance(layer, nn.Conv2d) for layer in encoder.modules())
    return has_convolutions and not hasattr(encoder.backbone, "patch_embed")


def _checkpoint_gradients(encoder: Encoder) -> None:
    switch = getattr(encoder.backbone, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError("it has no set_grad_checkpointing")
        switch(True)
    except AssertionError as error:  # timm's own way to say no
        raise ConfigError(
            f"{encoder.architecture} does not support gradient checkpointing: {error}",
            hint="set resources.gradient_checkpointing to false; a contrastive method's grad_cache"
            " works with every encoder",
        ) from error
