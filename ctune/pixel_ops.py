"""Pixel operations on whole batches with per-image parameters; none changes its input.

Each agrees with the function of that name in `torchvision.transforms.v2.functional` on float images
within 1e-5. Shapes: B images, s output side; parameters are [B].
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
_HUE_CENTRES = (0.0, 2.0, -2.0)
"""Hues of red, green and blue in sixths of a turn."""
LARGE_VIEW_PX = 64
"""Side from which, on the CPU, resizing images one by one beats dense matrix products."""


def resized_crop(
    images: Tensor, boxes: Tensor, size_px: int, *, flip: Tensor | None = None
) -> Tensor:
    """Crop each image to its box and resize the crop to s x s, bilinear with antialiasing.

    On CUDA with TF32 matrix products the weights are rounded to 11 bits: up to 0.2 grey levels.

    Args:
        images: [B, 3, H, W], uint8 (scaled to [0, 1]) or float32.
        boxes: [B, 4] int64 on the CPU, inside the images.
        size_px: s.
        flip: [B] bool on the CPU; which crops to mirror left-right.

    Returns:
        [B, 3, s, s] float32.
    """
    if images.device.type == "cpu" and size_px >= LARGE_VIEW_PX:
        return _resize_each(images, boxes, size_px, flip)
    return _resize_together(images, boxes, size_px, flip)


def _resize_each(images: Tensor, boxes: Tensor, size_px: int, flip: Tensor | None) -> Tensor:
    flips = [False] * len(boxes) if flip is None else flip.tolist()
    views = []
    for image, (top, left, height, width), flipped in zip(
        images, boxes.tolist(), flips, strict=True
    ):
        crop = image[None, :, top : top + height, left : left + width].float()
        view = interpolate(crop, (size_px, size_px), mode="bilinear", antialias=True)
        views.append(hflip(view) if flipped else view)
    stacked = views[0] if len(views) == 1 else torch.cat(views)
    return stacked.mul_(1 / 255) if images.dtype == torch.uint8 else stacked


def _resize_together(images: Tensor, boxes: Tensor, size_px: int, flip: Tensor | None) -> Tensor:
    """Two batched products with per-image weights: exact, and one kernel each on a GPU."""
    count, channels, height, width = images.shape
    boxes = boxes.to(images.device, torch.float32, non_blocking=True)
    places = torch.arange(size_px, device=images.device)[None] + 0.5
    down = _resize_weights(places, boxes[:, 0], boxes[:, 2], height)
    if flip is not None:
        mirrored = flip.to(images.device, non_blocking=True)[:, None]
        places = torch.where(mirrored, size_px - places, places)
    across = _resize_weights(places, boxes[:, 1], boxes[:, 3], width)
    if images.dtype == torch.uint8:
        down = down.mul_(1 / 255)
    rows = images.float().reshape(count, channels * height, width)
    narrow = torch.bmm(rows, across.transpose(1, 2)).view(count, channels, height, size_px)
    return torch.matmul(down[:, None], narrow)


def _resize_weights(places: Tensor, start: Tensor, length: Tensor, source_px: int) -> Tensor:
    """Return [B, s, source_px]: the antialiasing triangle filter inside [start, start + length).

    `places` are the centres of the output pixels, in output pixels, [B or 1, s].
    """
    start, length = start[:, None], length[:, None]
    scale = length / places.shape[1]
    source = torch.arange(source_px, device=start.device) - start
    inside = ((source >= 0) & (source < length)).float()
    distance = ((source + 0.5)[:, None, :] - (places * scale)[:, :, None]).abs_()
    weights = distance.div_(-scale.clamp(min=1)[:, :, None]).add_(1).clamp_(min=0)
    weights.mul_(inside[:, None, :])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def hflip(images: Tensor) -> Tensor:
    """Mirror [B, 3, H, W] images left-right."""
    return images.flip(-1)


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
