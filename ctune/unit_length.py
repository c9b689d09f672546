"""Vectors of length one."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def unit_length(vectors: Tensor) -> Tensor:
    """Scale vectors [..., d] to length 1, in float32 at least, also under autocast.

    The epsilon is 1e-12: a vector of zeros stays zero.
    """
    exact = vectors if vectors.dtype == torch.float64 else vectors.float()
    return normalize(exact, dim=-1, eps=1e-12)
