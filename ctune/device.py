"""Which device a run uses."""

import torch

from ctune.errors import ConfigError


def choose_device(gpus: int | None) -> torch.device:
    """Return the device: the CPU for 0, the GPU for 1, the GPU if there is one for None.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if gpus == 0 or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"resources.gpus is {gpus}, but no GPU is visible here",
            hint="set resources.gpus to 0 or run on a machine with a GPU",
        )
    return torch.device("cuda", 0)
