"""Position embeddings of vision transformers: the fixed sine-cosine table, and other grids.

Letters: L patches in row-major order, D dimensions, P prefix tokens.
"""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, allclose, cat, from_numpy
from torch.nn import functional as F

_LONGEST_PERIOD = 10000.0
_TOLERANCE = 1e-2
"""Covers tables that were stored in bfloat16."""


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int | tuple[int, int], *, cls_token: bool = False
) -> NDArray[np.float64]:
    """Return the table [L, D], with `cls_token` [1 + L, D] whose first row is 0 (mae.md 2.3).

    The first half of a row encodes the patch's *column* and the second its row, each as n sines and
    n cosines with n = D / 4 and frequencies 10000^(-i/n): facebookresearch/mae,
    ``util/pos_embed.py``, where the names of the variables suggest the reverse.

    Args:
        embed_dim: D.
        grid_size: patches per side, or (rows, columns).
        cls_token: whether there is a class token before the patches.

    Raises:
        ValueError: D is no positive multiple of 4; a side of the grid below 1.
    """
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"embed_dim is {embed_dim}; it must be a multiple of 4")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid_size is {rows} x {columns}; each side must be at least 1")
    n = embed_dim // 4
    frequencies = _LONGEST_PERIOD ** (-np.arange(n, dtype=np.float64) / n)
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [position[:, None] * frequencies for position in (column, row)]
    table = np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, embed_dim)), table]) if cls_token else table


def resize_pos_embed(
    pos_embed: Tensor, new_grid_size: int, *, num_prefix_tokens: int = 1
) -> Tensor:
    """Return a position embedding [1, P + g², D] for a grid of n x n: [1, P + n², D].

    Bicubic without antialiasing, prefix rows as they are: facebookresearch/mae,
    ``util/pos_embed.py: interpolate_pos_embed``. timm's own resampling antialiases, which differs
    by up to 0.1 per entry.

    Args:
        pos_embed: any float type; computed in it, the half ones in float32.
        new_grid_size: n.
        num_prefix_tokens: P.

    Raises:
        ValueError: not [1, P + g², D] for a whole g of at least 1; n below 1.
    """
    if new_grid_size < 1:
        raise ValueError(f"new_grid_size is {new_grid_size}; it must be at least 1")
    side = _grid_side(pos_embed, num_prefix_tokens)
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    if side == new_grid_size:
        return pos_embed
    grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    wide = grid if grid.dtype.itemsize > 2 else grid.float()
    resized = F.interpolate(
        wide, size=(new_grid_size, new_grid_size), mode="bicubic", align_corners=False
    )
    return cat((prefix, resized.to(grid.dtype).permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def recompute_pos_embed(
    pos_embed: Tensor, new_grid_size: int, *, num_prefix_tokens: int = 1
) -> Tensor:
    """Return the fixed table of n x n patches [1, P + n², D] in the place of that of g x g.

    What a masked autoencoder from scratch on n x n patches begins with, prefix rows as they are
    (mae.md 2.8). Arguments as `resize_pos_embed`.

    Raises:
        ValueError: as there; `pos_embed` is no fixed table: its positions were trained.
    """
    if not is_fixed_table(pos_embed, num_prefix_tokens=num_prefix_tokens):
        raise ValueError("the positions are not a fixed sine-cosine table: they were trained")
    table = get_2d_sincos_pos_embed(pos_embed.shape[2], new_grid_size)
    patches = from_numpy(table)[None].to(pos_embed)
    return cat((pos_embed[:, :num_prefix_tokens], patches), dim=1)


def is_fixed_table(pos_embed: Tensor, *, num_prefix_tokens: int = 1) -> bool:
    """Return whether the patches' positions in [1, P + g², D] are the fixed table of their grid.

    Raises:
        ValueError: not [1, P + g², D] for a whole g of at least 1.
    """
    side = _grid_side(pos_embed, num_prefix_tokens)
    width = pos_embed.shape[2]
    if width % 4:
        return False
    table = from_numpy(get_2d_sincos_pos_embed(width, side))
    return allclose(pos_embed[0, num_prefix_tokens:].to(table), table, rtol=0, atol=_TOLERANCE)


def _grid_side(pos_embed: Tensor, num_prefix_tokens: int) -> int:
    """Return g of a position embedding [1, P + g², D]."""
    rows = pos_embed.shape[1] - num_prefix_tokens if pos_embed.ndim == 3 else 0
    side = math.isqrt(max(rows, 0))
    if rows < 1 or side * side != rows or pos_embed.shape[0] != 1:
        raise ValueError(
            f"pos_embed has shape {tuple(pos_embed.shape)}; with {num_prefix_tokens} prefix tokens"
            " it must be [1, that + a square number, D]"
        )
    return side
