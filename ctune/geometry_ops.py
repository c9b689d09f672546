"""Crops, flips and affine maps of whole batches with per-image parameters; none changes its input.

Each agrees with the function of that name in `torchvision.transforms.v2.functional` on float images
within 1e-5. Shapes: B images, s output side; parameters are [B].
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

Interpolation = Literal["bilinear", "bicubic"]

LARGE_VIEW_PX = 64
"""Side from which, on the CPU, resizing images one by one beats dense matrix products."""


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    size_px: int,
    *,
    flip: Tensor | None = None,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Crop each image to its box and resize the crop to s x s, with antialiasing.

    On CUDA with TF32 matrix products the weights are rounded to 11 bits: up to 0.2 grey levels.

    Args:
        images: [B, 3, H, W], uint8 (scaled to [0, 1]) or float32.
        boxes: [B, 4] int64 on the CPU, inside the images.
        size_px: s.
        flip: [B] bool on the CPU; which crops to mirror left-right.
        interpolation: bicubic overshoots at edges; its results are clamped to [0, 1], as 8-bit
            images are.

    Returns:
        [B, 3, s, s] float32.
    """
    each = images.device.type == "cpu" and size_px >= LARGE_VIEW_PX
    resize = _resize_each if each else _resize_together
    views = resize(images, boxes, size_px=size_px, flip=flip, interpolation=interpolation)
    return views.clamp_(0, 1) if interpolation == "bicubic" else views


def _resize_each(
    images: Tensor,
    boxes: Tensor,
    *,
    size_px: int,
    flip: Tensor | None,
    interpolation: Interpolation,
) -> Tensor:
    flips = [False] * len(boxes) if flip is None else flip.tolist()
    views = []
    for image, (top, left, height, width), flipped in zip(
        images, boxes.tolist(), flips, strict=True
    ):
        crop = image[None, :, top : top + height, left : left + width].float()
        view = interpolate(crop, (size_px, size_px), mode=interpolation, antialias=True)
        views.append(hflip(view) if flipped else view)
    stacked = views[0] if len(views) == 1 else torch.cat(views)
    return stacked.mul_(1 / 255) if images.dtype == torch.uint8 else stacked


def _resize_together(
    images: Tensor,
    boxes: Tensor,
    *,
    size_px: int,
    flip: Tensor | None,
    interpolation: Interpolation,
) -> Tensor:
    """Two batched products with per-image weights: exact, and one kernel each on a GPU."""
    count, channels, height, width = images.shape
    boxes = boxes.to(images.device, torch.float32, non_blocking=True)
    places = torch.arange(size_px, device=images.device)[None] + 0.5
    kernel = _FILTERS[interpolation]
    down = _resize_weights(places, boxes[:, 0], boxes[:, 2], source_px=height, kernel=kernel)
    if flip is not None:
        mirrored = flip.to(images.device, non_blocking=True)[:, None]
        places = torch.where(mirrored, size_px - places, places)
    across = _resize_weights(places, boxes[:, 1], boxes[:, 3], source_px=width, kernel=kernel)
    if images.dtype == torch.uint8:
        down = down.mul_(1 / 255)
    rows = images.float().reshape(count, channels * height, width)
    narrow = torch.bmm(rows, across.transpose(1, 2)).view(count, channels, height, size_px)
    return torch.matmul(down[:, None], narrow)


def _resize_weights(
    places: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    source_px: int,
    kernel: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return [B, s, source_px]: the antialiasing filter inside [start, start + length).

    `places` are the centres of the output pixels, in output pixels, [B or 1, s].
    """
    start, length = start[:, None], length[:, None]
    scale = length / places.shape[1]
    source = torch.arange(source_px, device=start.device) - start
    inside = ((source >= 0) & (source < length)).float()
    distance = ((source + 0.5)[:, None, :] - (places * scale)[:, :, None]).abs_()
    weights = kernel(distance.div_(scale.clamp(min=1)[:, :, None]))
    weights.mul_(inside[:, None, :])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, the one of antialiased resizing."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far).mul_(distance < 2)


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}


def hflip(images: Tensor) -> Tensor:
    """Mirror [B, 3, H, W] images left-right."""
    return images.flip(-1)


def vflip(images: Tensor) -> Tensor:
    """Mirror [B, 3, H, W] images top-bottom."""
    return images.flip(-2)


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Move [B, C, H, W] images down and right by `shift` [B, 2] whole pixels, filling with 0."""
    down, right = shift.to(torch.float64).unbind(1)
    one, zero = torch.ones_like(down), torch.zeros_like(down)
    matrix = torch.stack((one, zero, -right, zero, one, -down), dim=1).view(-1, 2, 3)
    return affine(images, matrix, interpolation="nearest")


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn images counter-clockwise about their centre; nearest pixel, corners filled with 0.

    Args:
        images: [B, 3, H, W].
        degrees: [B].
    """
    return affine(images, rotation_matrix(degrees), interpolation="nearest")


def rotation_matrix(degrees: Tensor) -> Tensor:
    """Return [B, 2, 3] for `affine`: a counter-clockwise turn by `degrees` [B]."""
    angle = degrees.double().deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = torch.stack((cos, -sin, zero, sin, cos, zero), dim=1)
    return rows.view(-1, 2, 3)


def affine(
    images: Tensor,
    matrix: Tensor,
    *,
    interpolation: Literal["nearest", "bilinear"],
    fill: tuple[float, ...] | None = None,
) -> Tensor:
    """Move pixels by an affine map per image; what comes from outside is `fill`, else 0.

    Args:
        images: [B, C, H, W] float.
        matrix: [B, 2, 3]: from a pixel (x, y, 1) of the result to (x, y) in the image, both
            counted in pixels from the centre, y downwards.
        interpolation: bilinear blends with the fill at the image's border.
        fill: colour per channel.
    """
    height, width = images.shape[2:]
    to_unit = matrix.new_tensor([[1, height / width, 2 / width], [width / height, 1, 2 / height]])
    theta = (matrix * to_unit).to(images)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    if fill is None:
        return grid_sample(images, grid, mode=interpolation, align_corners=False)
    colour = images.new_tensor(fill)[:, None, None]
    moved = grid_sample(images - colour, grid, mode=interpolation, align_corners=False)
    return moved.add_(colour)
