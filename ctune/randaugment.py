"""RandAugment on whole batches, as timm's `rand-m9-mstd0.5-inc1` does it image by image.

Cubuk et al., arXiv 1909.13719; operations and strengths are those of `timm.data.auto_augment` with
`inc1`: the greater the magnitude, the stronger each operation. Images are float in [0, 1] instead
of 8-bit and geometry is bilinear (timm: the crop's interpolation); otherwise equal to rounding.

Shapes: B images, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2 import functional as F

from ctune.geometry_ops import affine, rotation_matrix
from ctune.pixel_ops import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    apply_to_rows,
    solarise,
)

_MAX_MAGNITUDE = 10


@dataclass(frozen=True)
class RandAugment:
    """What is drawn per image; the defaults are `rand-m9-mstd0.5-inc1`."""

    magnitude: float = 9.0
    """Mean strength, of 10."""
    magnitude_std: float = 0.5
    num_layers: int = 2
    """Operations drawn per image, with replacement."""
    prob: float = 0.5
    """That a drawn operation is carried out."""


def draw_operations(config: RandAugment, uniform: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    """Return operations [B, L] int64 (-1: none) and their arguments [B, L] float32.

    Args:
        config: distributions.
        uniform: [B, 3 * L] in [0, 1): operation, whether, sign.
        normal: [B, L] standard normal: magnitudes.
    """
    which, whether, sign = uniform.chunk(3, dim=1)
    operations = (which * len(OPERATIONS)).long()
    magnitudes = config.magnitude + config.magnitude_std * normal
    levels = magnitudes.clamp(0, _MAX_MAGNITUDE) / _MAX_MAGNITUDE
    signed = torch.where(sign < 0.5, levels, -levels)
    table = torch.stack([rule(levels, signed) for rule, _ in OPERATIONS.values()])
    arguments = table.gather(0, operations[None])[0]
    return operations.where(whether < config.prob, -1), arguments.float()


def apply_operations(
    images: Tensor, operations: Tensor, arguments: Tensor, *, fill: tuple[float, ...]
) -> Tensor:
    """Carry out each image's operations, layer after layer; may change `images` in place.

    Args:
        images: [B, 3, H, W] in [0, 1].
        operations: [B, L] on the CPU, -1: none.
        arguments: [B, L] on the CPU.
        fill: colour of what geometric operations bring in from outside.
    """
    for drawn, values in zip(operations.unbind(1), arguments.unbind(1), strict=True):
        for number, (name, (_, change)) in enumerate(OPERATIONS.items()):
            rows = (drawn == number).nonzero()[:, 0]
            if not len(rows):
                continue
            strengths = values[rows].to(images.device, non_blocking=True)
            rows = rows.to(images.device, non_blocking=True)
            if name in _GEOMETRIC:
                images = apply_to_rows(images, rows, _moving(change, fill), strengths)
            else:
                images = apply_to_rows(images, rows, change, strengths)
    return images


def posterise(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the first `bits` [B] of 8 of each value."""
    step = 2.0 ** (8 - bits)[:, None, None, None]
    return (images * 255).round_().div_(step).floor_().mul_(step / 255)


def solarise_add(images: Tensor, amount: Tensor) -> Tensor:
    """Add `amount` [B], of 255, to what is below 128."""
    brighter = (images + amount[:, None, None, None] / 255).clamp_(max=1)
    return torch.where(images < 128 / 255, brighter, images)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images with a version smoothed by 3 x 3 weights (1, but 5 in the middle) / 13.

    Factor 1 keeps, 0 smooths; the outermost pixels stay as they are. Not torchvision's, which takes
    one factor, and whose convolution is many times slower on the CPU.
    """
    if min(images.shape[2:]) < 3:
        return images
    inner = images[:, :, 1:-1, 1:-1]
    smooth = avg_pool2d(images, 3, stride=1).mul_(9 / 13).add_(inner, alpha=4 / 13)
    sharper = images.clone()
    sharper[:, :, 1:-1, 1:-1] += (inner - smooth).mul_((factor - 1)[:, None, None, None])
    return sharper.clamp_(0, 1)


def _moving(
    matrix: Callable[[Tensor, Tensor], Tensor], fill: tuple[float, ...]
) -> Callable[[Tensor, Tensor], Tensor]:
    def move(images: Tensor, strength: Tensor) -> Tensor:
        return affine(images, matrix(images, strength), interpolation="bilinear", fill=fill)

    return move


def _rotation(images: Tensor, degrees: Tensor) -> Tensor:
    return rotation_matrix(degrees)


def _shear_x(images: Tensor, factor: Tensor) -> Tensor:
    """About the top left corner, from where y is counted."""
    return _affine_rows(x=(1, factor, factor * images.shape[2] / 2), like=factor)


def _shear_y(images: Tensor, factor: Tensor) -> Tensor:
    return _affine_rows(y=(factor, 1, factor * images.shape[3] / 2), like=factor)


def _translation_x(images: Tensor, share: Tensor) -> Tensor:
    return _affine_rows(x=(1, 0, share * images.shape[3]), like=share)


def _translation_y(images: Tensor, share: Tensor) -> Tensor:
    return _affine_rows(y=(0, 1, share * images.shape[2]), like=share)


def _affine_rows(
    *,
    x: tuple[float | Tensor, ...] = (1, 0, 0),
    y: tuple[float | Tensor, ...] = (0, 1, 0),
    like: Tensor,
) -> Tensor:
    """Return [B, 2, 3] from entries that are numbers or [B]."""
    return torch.stack([value + torch.zeros_like(like) for value in (*x, *y)], 1).view(-1, 2, 3)


def _unused(levels: Tensor, signed: Tensor) -> Tensor:
    return levels


def _enhancement(levels: Tensor, signed: Tensor) -> Tensor:
    return (1 + 0.9 * signed).clamp(min=0.1)


Rule = Callable[[Tensor, Tensor], Tensor]

OPERATIONS: dict[str, tuple[Rule, Rule]] = {
    "autocontrast": (_unused, lambda images, _: F.autocontrast(images)),
    "equalize": (_unused, lambda images, _: F.equalize(images)),
    "invert": (_unused, lambda images, _: 1 - images),
    "rotate": (lambda levels, signed: 30 * signed, _rotation),
    "posterise": (lambda levels, signed: 4 - (4 * levels).floor(), posterise),
    "solarise": (
        lambda levels, signed: 256 - (256 * levels).floor(),
        lambda images, threshold: solarise(images, threshold / 255),
    ),
    "solarise_add": (lambda levels, signed: (110 * levels).floor(), solarise_add),
    "saturation": (_enhancement, adjust_saturation),
    "contrast": (_enhancement, adjust_contrast),
    "brightness": (_enhancement, adjust_brightness),
    "sharpness": (_enhancement, adjust_sharpness),
    "shear_x": (lambda levels, signed: 0.3 * signed, _shear_x),
    "shear_y": (lambda levels, signed: 0.3 * signed, _shear_y),
    "translate_x": (lambda levels, signed: 0.45 * signed, _translation_x),
    "translate_y": (lambda levels, signed: 0.45 * signed, _translation_y),
}
"""Per operation: strength from (level in [0, 1], level with a random sign), and the change itself,
for the geometric ones the matrix of `affine`."""

_GEOMETRIC = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
