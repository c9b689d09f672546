"""Colour and filter operations on whole batches with per-image parameters.

None but `apply_to_rows` changes its input. Each agrees with the function of that name in
`torchvision.transforms.v2.functional` on float images within 1e-5. Shapes: B images; parameters
are [B].
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
_HUE_CENTRES = (0.0, 2.0, -2.0)
"""Hues of red, green and blue in sixths of a turn."""
_BLUR_BLOCK_PX = 32
"""Blurred in blocks of this side, as the matrix is a band: at 224 px a third of the products."""


def apply_to_rows(
    images: Tensor, rows: Tensor, operation: Callable[..., Tensor], *parameters: Tensor
) -> Tensor:
    """Change some rows in place, or return a changed copy of all; parameters are those of `rows`.

    Args:
        images: [B, ...].
        rows: ascending, on the device of the images.
        operation: called with the rows and the parameters.
        parameters: one entry per row.
    """
    if len(rows) == len(images):
        return operation(images, *parameters)
    return images.index_copy_(0, rows, operation(images[rows], *parameters))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply [B, 3, H, W] images in [0, 1] by `factor` [B] >= 0 and clamp to [0, 1]."""
    return (images * _per_image(factor)).clamp_(max=1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images in [0, 1] with the mean of their grey version; 1 keeps, 0 gives flat grey.

    Args:
        images: [B, 3, H, W].
        factor: [B], at least 0.
    """
    factor = _per_image(factor)
    weights = _per_channel(_GRAY_WEIGHTS, images.device)
    mean = (images.mean(dim=(2, 3), keepdim=True) * weights).sum(dim=1, keepdim=True)
    return (images * factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images in [0, 1] with their grey version; 1 keeps, 0 gives grey.

    Args:
        images: [B, 3, H, W].
        factor: [B], at least 0.
    """
    factor = _per_image(factor)
    return (images * factor).add_(_luma(images).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue of images in [0, 1] by `factor`, in turns; value and saturation stay.

    With colours scaled to r', g', b' in [0, 1] between the least and the greatest channel, the
    distance of the hue from red in sixths of a turn is 1 - r' + g' + b', on green's side where
    g > b; and a channel at distance d from the hue has the scaled value min(max(2 - d, 0), 1).

    Args:
        images: [B, 3, H, W].
        factor: [B] in [-0.5, 0.5].
    """
    red, green, blue = images.chunk(3, dim=1)
    least = torch.minimum(torch.minimum(red, green), blue)
    spread = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    hue = (green - red).add_(blue - least).div_(spread.clamp(min=1e-20)).add_(1)
    hue = hue.copysign_(green - blue).add_(_per_image(factor * 6))
    hue.sub_((hue / 6).round_(), alpha=6)
    scaled = (
        (hue - _per_channel(_HUE_CENTRES, images.device)).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    )
    return scaled.mul_(spread).add_(least)


def to_grayscale(images: Tensor) -> Tensor:
    """Replace the channels of [B, 3, H, W] images by their luma."""
    return _luma(images).expand_as(images)


def solarise(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at least `threshold` [B] in [B, 3, H, W] images in [0, 1]."""
    return torch.where(images >= _per_image(threshold), 1 - images, images)


def gaussian_blur(images: Tensor, sigma_px: Tensor, *, radius_px: int) -> Tensor:
    """Blur with a Gaussian cut off at `radius_px`; images are continued by reflection.

    Args:
        images: [B, 3, H, W].
        sigma_px: [B], above 0.
        radius_px: half the kernel: 2 * radius_px + 1 weights; at most the least side - 1.
    """
    places = torch.arange(-radius_px, radius_px + 1, device=images.device) / sigma_px[:, None]
    weights = places.square_().mul_(-0.5).softmax(dim=1)
    for _ in range(2):  # along the rows, then along the columns
        images = _filter_rows(images, weights).transpose(2, 3)
    return images


def _filter_rows(images: Tensor, weights: Tensor) -> Tensor:
    """Filter along the width: the weights as the band of a matrix, one block at a time."""
    count, channels, height, width = images.shape
    taps = weights.shape[1]
    radius = taps // 2
    blocks = -(-width // _BLUR_BLOCK_PX)
    block = -(-width // blocks)
    band = weights.new_zeros(count, block * (block + taps))
    # Rows of block + taps entries, read as rows of one entry less, each start one place later.
    band.view(count, block, block + taps)[:, :, :taps] = weights[:, None]
    band = band[:, : block * (block + taps - 1)].view(count, block, block + taps - 1)
    padded = pad(images, (radius, radius, 0, 0), mode="reflect")
    if missing := blocks * block - width:
        padded = pad(padded, (0, missing))
    windows = padded.unfold(3, block + taps - 1, block).reshape(count, -1, block + taps - 1)
    filtered = torch.bmm(windows, band.transpose(1, 2))
    return filtered.view(count, channels, height, blocks * block)[..., :width]


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    """Fill one box per image with standard normal noise, in place ("pixel" random erasing).

    Args:
        images: [B, 3, H, W], normalised.
        boxes: [B, 4] int64 on the CPU; height 0: nothing is erased.
        seeds: [B] int64 on the CPU: the noise is the same on every device.
    """
    for row in boxes[:, 2].nonzero()[:, 0].tolist():
        top, left, height, width = boxes[row].tolist()
        generator = torch.Generator().manual_seed(int(seeds[row]))
        noise = torch.randn(images.shape[1], height, width, generator=generator)
        images[row, :, top : top + height, left : left + width] = noise.to(images.device)
    return images


def normalise(
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return (images - mean) / std per channel of [B, 3, H, W] images, in `out` where given."""
    centred = torch.sub(images, _per_channel(mean, images.device), out=out)
    return centred.div_(_per_channel(std, images.device))


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.chunk(3, dim=1)
    r, g, b = _GRAY_WEIGHTS
    return (red * r).add_(green, alpha=g).add_(blue, alpha=b)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]
