"""From a transformer's tokens to one vector per image.

Letters: B images, T tokens (prefix first: class token, registers), D dimensions.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

Pool = Literal["mean", "cls", "mean_all", "cls_mean", "cls_concat_mean"]
NEEDS_CLASS_TOKEN = ("cls", "cls_mean", "cls_concat_mean")
HAS_NORM = ("mean", "cls")


def pool_tokens(
    tokens: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    pool: Pool,
    num_prefix_tokens: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Pool tokens [B, T, D] to features [B, D], with the LayerNorm that belongs to the pooling.

    ``mean`` averages the tokens after the prefix and then normalises (``fc_norm`` of
    facebookresearch/mae, ``models_vit.py``); ``cls`` normalises the tokens and takes the first.
    LayerNorm acts on each token alone, so for ``cls`` only that one is normalised. The others are
    those of MAE-CT (arXiv 2304.10520) and take tokens that were normalised before: ``mean_all``
    averages all tokens, ``cls_mean`` the class token and the mean of the patches,
    ``cls_concat_mean`` puts the two side by side, [B, 2D].

    Args:
        tokens: [B, T, D].
        norm_weight: [D]; without weight and bias there is no LayerNorm.
        norm_bias: [D].
        pool: see above.
        num_prefix_tokens: tokens before the patches; ``cls`` and the like need at least one.
        eps: of the LayerNorm.

    Raises:
        ValueError: tokens not [B, T, D]; no patch token to average or no class token to take; a
            norm that is half given, not [D] or not of this pooling; an unknown pooling.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens has shape {list(tokens.shape)}; it must be [B, T, D]")
    _check_norm(tokens, norm_weight, norm_bias, pool)
    _check_prefix(tokens, num_prefix_tokens, pool)
    first, patches = tokens[:, 0], tokens[:, num_prefix_tokens:]
    if pool == "mean":
        pooled = patches.mean(1)
    elif pool == "cls":
        pooled = first
    elif pool == "mean_all":
        pooled = tokens.mean(1)
    elif pool == "cls_mean":
        pooled = (first + patches.mean(1)) / 2
    elif pool == "cls_concat_mean":
        pooled = torch.cat([first, patches.mean(1)], 1)
    else:
        raise ValueError(f"pool is {pool!r}; use one of {', '.join(get_args(Pool))}")
    if norm_weight is None:
        return pooled
    return layer_norm(pooled, tokens.shape[2:], norm_weight, norm_bias, eps)


def _check_norm(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, pool: Pool) -> None:
    if (weight is None) != (bias is None):
        raise ValueError("norm_weight and norm_bias must both be given or both be None")
    if weight is not None and pool not in HAS_NORM:
        raise ValueError(f"pool {pool!r} takes tokens that were normalised before; give no norm")
    D = tokens.shape[2]
    for name, value in (("norm_weight", weight), ("norm_bias", bias)):
        if value is not None and value.shape != (D,):
            raise ValueError(f"{name} has shape {list(value.shape)}; the tokens need [{D}]")


def _check_prefix(tokens: Tensor, num_prefix_tokens: int, pool: Pool) -> None:
    T = tokens.shape[1]
    if pool in NEEDS_CLASS_TOKEN and not 1 <= num_prefix_tokens <= T:
        raise ValueError(
            f"pool is {pool!r} but num_prefix_tokens is {num_prefix_tokens} of {T} tokens; an "
            "encoder without a class token needs pool='mean'"
        )
    if pool != "cls" and not 0 <= num_prefix_tokens < T:
        raise ValueError(
            f"num_prefix_tokens is {num_prefix_tokens}, which leaves no patch token of {T}; "
            f"it must be in [0, {T - 1}]"
        )
