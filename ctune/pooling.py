"""From a transformer's tokens to one vector per image.

Letters: B images, T tokens (prefix first: class token, registers), D dimensions.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import layer_norm

Pool = Literal["mean", "cls"]


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
    LayerNorm acts on each token alone, so for ``cls`` only that one is normalised.

    Args:
        tokens: [B, T, D].
        norm_weight: [D]; without weight and bias there is no LayerNorm.
        norm_bias: [D].
        pool: see above.
        num_prefix_tokens: tokens before the patches; ``cls`` needs at least one.
        eps: of the LayerNorm.

    Raises:
        ValueError: tokens not [B, T, D]; no patch token to average or no class token to take; a
            norm that is half given or not [D]; an unknown pooling.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens has shape {list(tokens.shape)}; it must be [B, T, D]")
    T, D = tokens.shape[1:]
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must both be given or both be None")
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None and value.shape != (D,):
            raise ValueError(f"{name} has shape {list(value.shape)}; the tokens need [{D}]")
    if pool == "mean":
        if not 0 <= num_prefix_tokens < T:
            raise ValueError(
                f"num_prefix_tokens is {num_prefix_tokens}, which leaves no patch token of {T}; "
                f"it must be in [0, {T - 1}]"
            )
        pooled = tokens[:, num_prefix_tokens:].mean(1)
    elif pool == "cls":
        if not 1 <= num_prefix_tokens <= T:
            raise ValueError(
                f"pool is 'cls' but num_prefix_tokens is {num_prefix_tokens} of {T} tokens; an "
                "encoder without a class token needs pool='mean'"
            )
        pooled = tokens[:, 0]
    else:
        raise ValueError(f"pool is {pool!r}; use 'mean' or 'cls'")
    if norm_weight is None:
        return pooled
    return layer_norm(pooled, (D,), norm_weight, norm_bias, eps)
