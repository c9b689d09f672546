"""Patches of images: cutting, hiding and comparing them (mae.md 2.4 to 2.6).

Letters: N images, C channels, p side of a patch in pixels, L patches in row-major order, d = p²C
values of a patch, K visible patches, P prefix tokens, D dimensions of a token.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

VARIANCE_EPS = 1e-6


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """Return the patches [N, L, p²C] of images [N, C, H, W]; in a patch the channel runs fastest.

    Raises:
        ValueError: a side of the images is no multiple of the patch's.
    """
    N, C, H, W = imgs.shape
    p = patch_size
    if p < 1 or H % p or W % p:
        raise ValueError(f"images of {H} x {W} px cannot be cut into patches of {p} px")
    grid = imgs.reshape(N, C, H // p, p, W // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(N, (H // p) * (W // p), p * p * C)


def unpatchify(
    patches: Tensor,
    patch_size: int,
    *,
    grid_size: tuple[int, int] | None = None,
    channels: int = 3,
) -> Tensor:
    """Return the images [N, C, H, W] that `patchify` cut into `patches` [N, L, p²C].

    Args:
        patches: see there.
        patch_size: p.
        grid_size: patches as (rows, columns); None: a square of them.
        channels: C.

    Raises:
        ValueError: L patches do not fill the grid, or d is not p²C.
    """
    N, L, d = patches.shape
    p, side = patch_size, math.isqrt(L)
    rows, columns = grid_size or (side, side)
    if rows * columns != L or d != p * p * channels:
        raise ValueError(
            f"{L} patches of {d} values do not make {rows} x {columns} patches of {p} x {p} px in"
            f" {channels} channels"
        )
    grid = patches.reshape(N, rows, columns, p, p, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(N, channels, rows * p, columns * p)


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Return K = int(L (1 - mask_ratio)), of the exact product: int(10 * (1 - 0.9)) is 1, not 0.

    Raises:
        ValueError: mask_ratio outside [0, 1); no patch would be left.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must be in [0, 1)")
    visible = int(num_patches * (1 - mask_ratio) + 1e-9)
    if visible < 1:
        raise ValueError(
            f"a mask_ratio of {mask_ratio} leaves none of {num_patches} patches; lower it, or use"
            " smaller patches"
        )
    return visible


class Masked(NamedTuple):
    """Result of `random_masking`."""

    visible: Tensor
    """[N, K, D]: the kept patches, in the order of their noise."""
    mask: Tensor
    """[N, L], of the patches' type: 0 kept, 1 removed, in the patches' own order."""
    ids_restore: Tensor
    """[N, L] int64: where each patch stands when the kept ones come first."""


def random_masking(
    x: Tensor,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Masked:
    """Keep K patches of each sample, those of the smallest noise (mae.md 2.4).

    Args:
        x: patches [N, L, D].
        mask_ratio: 0 keeps all of them, shuffled.
        noise: [N, L]; None: uniform, from `generator`.
        generator: CPU generator; None: torch's global one.

    Raises:
        ValueError: noise of another shape; as `num_visible`.
    """
    N, L, D = x.shape
    K = num_visible(L, mask_ratio)
    if noise is None:
        noise = torch.rand(N, L, generator=generator).to(x.device)
    if noise.shape != (N, L):
        raise ValueError(f"noise has shape {tuple(noise.shape)}; the patches need {(N, L)}")
    # Stable, because the patches of a block have equal noise.
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    visible = torch.gather(x, 1, ids_shuffle[:, :K, None].expand(-1, -1, D))
    return Masked(visible, (ids_restore >= K).to(x.dtype), ids_restore)


def restore_masked_tokens(
    x: Tensor, mask_token: Tensor, ids_restore: Tensor, *, num_prefix_tokens: int = 1
) -> Tensor:
    """Put mask tokens where patches were removed: [N, P + K, D] becomes [N, P + L, D].

    Args:
        x: prefix tokens, then the visible patches in their shuffled order.
        mask_token: [1, 1, D].
        ids_restore: of `random_masking`, [N, L].
        num_prefix_tokens: P.
    """
    N, T, D = x.shape
    L, P = ids_restore.shape[1], num_prefix_tokens
    mask_tokens = mask_token.expand(N, L - (T - P), D).to(x.dtype)
    shuffled = torch.cat((x[:, P:], mask_tokens), dim=1)
    patches = torch.gather(shuffled, 1, ids_restore[..., None].expand(-1, -1, D))
    return torch.cat((x[:, :P], patches), dim=1)


def mae_reconstruction_loss(
    imgs: Tensor,
    pred: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    norm_pix_loss: bool = True,
) -> Tensor:
    """Return the mean squared error of the removed patches' pixels, a scalar (mae.md 2.6).

    Args:
        imgs: normalised images [N, C, H, W]; no gradient flows into them.
        pred: [N, L, d]; half types are taken to float32.
        mask: [N, L], 1 where a patch was removed.
        patch_size: p.
        norm_pix_loss: compare with each patch's pixels at mean 0 and (unbiased) variance 1.

    Raises:
        ValueError: nothing was removed, on the CPU only (a GPU would have to be waited for);
            shapes that do not fit; as `patchify`.
    """
    target = reconstruction_target(imgs, patch_size, norm_pix_loss=norm_pix_loss)
    if pred.shape != target.shape or mask.shape != target.shape[:2]:
        raise ValueError(
            f"pred has shape {tuple(pred.shape)} and mask {tuple(mask.shape)}; the patches are"
            f" {tuple(target.shape)}"
        )
    if mask.device.type == "cpu" and not mask.any():
        raise ValueError("no patch was removed, so that there is nothing to compare")
    pred = pred if pred.dtype.itemsize > 2 else pred.float()
    error = (pred - target).square().mean(dim=2)
    mask = mask.to(error.dtype)
    return (error * mask).sum() / mask.sum()


@torch.no_grad()
def reconstruction_target(imgs: Tensor, patch_size: int, *, norm_pix_loss: bool) -> Tensor:
    """Return what the decoder is to predict, [N, L, d], of normalised images [N, C, H, W]."""
    target = patchify(imgs, patch_size)
    if not norm_pix_loss:
        return target
    variance, mean = torch.var_mean(target, dim=2, keepdim=True)
    return (target - mean) / (variance + VARIANCE_EPS).sqrt()


@torch.no_grad()
def reconstructed_images(
    imgs: Tensor, pred: Tensor, *, mask: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """Return images [N, C, H, W] whose removed patches are the predicted ones (mae.md 5).

    Args:
        imgs: normalised images.
        pred: what the decoder made of them, [N, L, d].
        mask: [N, L], 1 where a patch was removed.
        patch_size: p.
        norm_pix_loss: `pred` was compared with patches at mean 0 and variance 1: each gets mean and
            variance of the image's own patch.
    """
    patches = patchify(imgs, patch_size)
    pred = pred.to(patches.dtype)
    if norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        pred = pred * (variance + VARIANCE_EPS).sqrt() + mean
    whole = torch.where(mask[..., None] == 1, pred, patches)
    grid_size = (imgs.shape[2] // patch_size, imgs.shape[3] // patch_size)
    return unpatchify(whole, patch_size, grid_size=grid_size, channels=imgs.shape[1])
