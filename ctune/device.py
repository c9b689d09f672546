"""Which device a run uses, and in which precision."""

from typing import Literal

import torch

from ctune.errors import ConfigError


def choose_device(gpus: int | None, local_rank: int = 0) -> torch.device:
    """Return the device: the CPU for 0, the process's GPU for 1 and more, for None if any.

    Raises:
        ConfigError: more GPUs are asked for than there are.
    """
    if gpus == 0 or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible < (gpus or 1):
        raise ConfigError(
            f"resources.gpus is {gpus}, but {visible or 'no'} GPU is visible here",
            hint="lower resources.gpus, to 0 for the CPU, or run on a machine with more GPUs",
        )
    return torch.device("cuda", local_rank)


def autocast_dtype(precision: Literal["fp32", "bf16"], device: torch.device) -> torch.dtype | None:
    """Return the type of autocast: bfloat16 where asked for on a GPU that has it, else none."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bf16" and on_gpu else None


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
