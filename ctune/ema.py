"""Moving averages of modules: teachers, target networks, averaged encoders.

A method keeps its average as a module of the program, so that it is saved in every checkpoint, and
updates it in `Method.after_step`; a momentum that changes is a `ctune.schedules.WarmupCosine`.
"""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of batch norm."""


def make_average(online: M) -> M:
    """Return a copy that is trained by `ema_update` alone; it shares no tensor with `online`."""
    return copy.deepcopy(online).requires_grad_(False)


@torch.no_grad()
def ema_update(
    online: Mapping[str, Tensor], target: Mapping[str, Tensor], *, momentum: float
) -> None:
    """Update target = momentum * target + (1 - momentum) * online in place, name by name.

    Statistics of batch norm and integers are copied. Both are ``module.state_dict()``, whose
    tensors are those of the module. With momentum 1 or equal values nothing changes, bit for bit.

    Args:
        online: what is trained, after its optimizer step.
        target: the average.
        momentum: in [0, 1].

    Raises:
        ValueError: momentum outside [0, 1]; names or shapes that differ.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1]")
    differing = sorted(online.keys() ^ target.keys()) or [
        name for name, value in online.items() if value.shape != target[name].shape
    ]
    if differing:
        raise ValueError(f"online and target differ in {differing[:10]}; copy one from the other")
    averaged = [
        name
        for name, value in online.items()
        if value.is_floating_point() and name.rpartition(".")[2] not in STATISTICS
    ]
    for name in online.keys() - set(averaged):
        target[name].copy_(online[name])
    if averaged:
        torch._foreach_lerp_(
            [target[name] for name in averaged], [online[name] for name in averaged], 1 - momentum
        )
