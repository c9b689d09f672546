"""Values of a conformance case as tensors and options; every file of adapters uses these."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]
Adapter = Callable[[Case, Case], Case]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def tensors(inputs: Case, parameters: Case, *names: str) -> list[Tensor]:
    """The named inputs as floating tensors, float64 unless the case says float32."""
    dtype = DTYPES[parameters.get("dtype", "float64")]
    return [torch.tensor(inputs[name], dtype=dtype) for name in names]


def integers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def options(parameters: Case, *leave_out: str) -> Case:
    """The parameters that are keyword arguments of the function."""
    return {name: v for name, v in parameters.items() if name not in ("dtype", *leave_out)}


def loss_and_gradient(loss: Tensor, leaf: Tensor, name: str) -> Case:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.item(), name: gradient.tolist()}
