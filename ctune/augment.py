"""Random views of whole batches on the device, each image with its own parameters.

The parameters of a batch are drawn on the CPU from one generator, so a view is the same on every
device; the pixels are computed where the images are. Every operation agrees with the function of
that name in `torchvision.transforms.v2.functional` on float images within 1e-5, the sampling rules
with `RandomResizedCrop`, `RandomHorizontalFlip`, `ColorJitter` and `RandomGrayscale` of
`torchvision.transforms.v2`.

Shapes: B images, s output side, sizes and boxes always as (height, width) and (top, left, height,
width) in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
_CROP_TRIES = 10
_CHUNK_VALUES = 2**18
"""Values of a chunk of views on the CPU: they stay in the cache between operations."""
_LARGE_VIEW_PX = 64
"""Side from which, on the CPU, resizing images one by one beats dense matrix products."""


@dataclass(frozen=True)
class ViewConfig:
    """What a random view is: crop, flip, colour changes, grey, normalisation, in this order."""

    size_px: int
    """Side of the square view."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, drawn log-uniformly."""
    flip_prob: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue changes; hue at most 0.5."""
    jitter_prob: float = 0.0
    grayscale_prob: float = 0.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class ViewParams:
    """Parameters of B views; tensors on the CPU, one row per view."""

    sizes: Tensor
    """[B, 2] int64: original height and width, in whose pixels `boxes` are."""
    boxes: Tensor
    """[B, 4] int64: top, left, height, width of the crop."""
    flip: Tensor
    """[B] bool."""
    jitter: Tensor
    """[B] bool: whether the colours are changed."""
    order: Tensor
    """[B, 4] int64: the operation at each place; 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    factors: Tensor
    """[B, 4] float32: brightness, contrast and saturation factor, hue shift in turns."""
    grayscale: Tensor
    """[B] bool."""

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, rows: Tensor | slice) -> "ViewParams":
        """Return the parameters of some of the views."""
        return ViewParams(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def sample_view_params(config: ViewConfig, sizes: Tensor, generator: torch.Generator) -> ViewParams:
    """Draw the parameters of one view per image.

    The draws of a call depend on the generator and on B alone, never on outcomes.

    Args:
        config: distributions.
        sizes: [B, 2] original height and width.
        generator: CPU generator.
    """
    count = len(sizes)
    sizes = sizes.to(device="cpu", dtype=torch.int64)

    def uniform(columns: int) -> Tensor:
        return torch.rand(count, columns, generator=generator, dtype=torch.float64)

    boxes = _sample_boxes(config, sizes, uniform(4 * _CROP_TRIES))
    chances = uniform(3)
    brightness, contrast, saturation, hue = config.jitter
    low = torch.tensor([max(0.0, 1 - v) for v in (brightness, contrast, saturation)] + [-hue])
    high = torch.tensor([1 + brightness, 1 + contrast, 1 + saturation, hue])
    return ViewParams(
        sizes=sizes,
        boxes=boxes,
        flip=chances[:, 0] < config.flip_prob,
        jitter=chances[:, 1] < config.jitter_prob,
        order=uniform(4).argsort(dim=1),
        factors=(low + (high - low) * uniform(4)).float(),
        grayscale=chances[:, 2] < config.grayscale_prob,
    )


def _sample_boxes(config: ViewConfig, sizes: Tensor, draws: Tensor) -> Tensor:
    """Torchvision's rule: the first of ten boxes that fits, else the largest central one."""
    heights, widths = sizes[:, :1], sizes[:, 1:]
    area_draw, ratio_draw, top_draw, left_draw = draws.chunk(4, dim=1)
    low, high = config.scale
    area = heights * widths * (low + (high - low) * area_draw)
    log_low, log_high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = (log_low + (log_high - log_low) * ratio_draw).exp()
    w = (area * ratio).sqrt().round().long()
    h = (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    top = (top_draw * (heights - h + 1)).long()
    left = (left_draw * (widths - w + 1)).long()
    tries = torch.stack((top, left, h, w), dim=2)
    first = fits.to(torch.uint8).argmax(dim=1)
    chosen = tries[torch.arange(len(sizes)), first]
    return torch.where(fits.any(dim=1, keepdim=True), chosen, _central_boxes(config, sizes))


def _central_boxes(config: ViewConfig, sizes: Tensor) -> Tensor:
    heights, widths = sizes.unbind(1)
    narrowest, widest = config.ratio
    in_ratio = widths.double() / heights
    h = torch.where(in_ratio < narrowest, (widths / narrowest).round().long(), heights)
    w = torch.where(in_ratio > widest, (heights * widest).round().long(), widths)
    h, w = h.clamp(min=1), w.clamp(min=1)
    return torch.stack(((heights - h) // 2, (widths - w) // 2, h, w), dim=1)


def scale_boxes(boxes: Tensor, sizes: Tensor, height_px: int, width_px: int) -> Tensor:
    """Carry boxes from images of `sizes` over to the same images resized to height x width.

    Edges go to the nearest whole pixel, so that a crop stays one of whole pixels; a box keeps at
    least one pixel.

    Args:
        boxes: [B, 4] int64.
        sizes: [B, 2] int64.
        height_px: stored height.
        width_px: stored width.
    """
    stored = torch.tensor([height_px, width_px])
    factor = stored.double() / sizes
    start = (boxes[:, :2] * factor).round().long().minimum(stored - 1)
    end = ((boxes[:, :2] + boxes[:, 2:]) * factor).round().long().maximum(start + 1)
    return torch.cat((start, end - start), dim=1)


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
    if images.device.type == "cpu" and size_px >= _LARGE_VIEW_PX:
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
    down = _resize_weights(boxes[:, 0], boxes[:, 2], height, size_px)
    across = _resize_weights(boxes[:, 1], boxes[:, 3], width, size_px)
    if flip is not None:
        mirrored = flip.to(images.device, non_blocking=True)[:, None, None]
        across = torch.where(mirrored, across.flip(1), across)
    if images.dtype == torch.uint8:
        down = down.mul_(1 / 255)
    rows = images.float().reshape(count, channels * height, width)
    narrow = torch.bmm(rows, across.transpose(1, 2)).view(count, channels, height, size_px)
    return torch.matmul(down[:, None], narrow)


def _resize_weights(start: Tensor, length: Tensor, source_px: int, size_px: int) -> Tensor:
    """Return [B, s, source_px]: the antialiasing triangle filter inside [start, start + length)."""
    scale = (length / size_px)[:, None, None]
    place = torch.arange(source_px, device=start.device) - start[:, None, None]
    centre = (torch.arange(size_px, device=start.device) + 0.5)[None, :, None] * scale
    distance = (place + 0.5 - centre).abs_().div_(scale.clamp(min=1))
    inside = (place >= 0) & (place < length[:, None, None])
    weights = (1 - distance).clamp_(min=0).mul_(inside)
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
    weights = torch.tensor(_GRAY_WEIGHTS, device=images.device)
    mean = _per_image(images.mean(dim=(2, 3)) @ weights)
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images in [0, 1] with their grey version; 1 keeps, 0 gives grey.

    Args:
        images: [B, 3, H, W].
        factor: [B], at least 0.
    """
    factor = _per_image(factor)
    return (images * factor).add_(_luma(images).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of images in [0, 1] by `shift`, in turns; value and saturation stay.

    With colours scaled to r', g', b' in [0, 1] between the least and the greatest channel, the
    distance of the hue from red in sixths of a turn is 1 - r' + g' + b', on green's side where
    g > b; and a channel at distance d from the hue has the scaled value min(max(2 - d, 0), 1).

    Args:
        images: [B, 3, H, W].
        shift: [B] in [-0.5, 0.5].
    """
    red, green, blue = images.chunk(3, dim=1)
    least = torch.minimum(torch.minimum(red, green), blue)
    spread = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    hue = (green - red).add_(blue - least).div_(spread.clamp(min=1e-20)).add_(1)
    hue = hue.copysign_(green - blue).add_(_per_image(shift * 6))
    hue.sub_((hue / 6).round_(), alpha=6)
    centres = torch.tensor([0.0, 2.0, -2.0], device=images.device)[:, None, None]
    scaled = (hue - centres).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    return scaled.mul_(spread).add_(least)


def to_grayscale(images: Tensor) -> Tensor:
    """Replace the channels of [B, 3, H, W] images by their luma."""
    return _luma(images).expand_as(images)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (images - mean) / std per channel of [B, 3, H, W] images."""
    shift = torch.tensor(mean, device=images.device)[:, None, None]
    return (images - shift).div_(torch.tensor(std, device=images.device)[:, None, None])


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.chunk(3, dim=1)
    r, g, b = _GRAY_WEIGHTS
    return (red * r).add_(green, alpha=g).add_(blue, alpha=b)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def colour_jitter(images: Tensor, params: ViewParams, strength: tuple[float, ...]) -> Tensor:
    """Change the colours of the views that `params.jitter` names, each in its own order.

    Args:
        images: [B, 3, H, W] in [0, 1].
        params: B rows.
        strength: an operation of strength 0 is left out.
    """
    factors = params.factors.to(images.device, non_blocking=True)
    for place in range(4):
        at_place = torch.where(params.jitter, params.order[:, place], -1)
        for index, operation in enumerate(_JITTER):
            if strength[index] > 0:
                images = _apply_to_rows(images, at_place == index, operation, factors[:, index])
    return images


def _apply_to_rows(
    images: Tensor,
    mask: Tensor,
    operation: Callable[[Tensor, Tensor], Tensor],
    factor: Tensor,
) -> Tensor:
    rows = mask.nonzero()[:, 0]
    if not len(rows):
        return images
    if len(rows) == len(images):
        return operation(images, factor)
    rows = rows.to(images.device, non_blocking=True)
    return images.index_copy(0, rows, operation(images[rows], factor[rows]))


class ViewPipeline:
    """Random views of batches; see `ViewConfig` for what is done, in which order."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    def __call__(self, images: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
        """Return one view [B, 3, s, s] float32 per image, normalised, on the images' device.

        Args:
            images: [B, 3, H, W] uint8; not changed.
            sizes: [B, 2] original height and width: the geometry in which crops are drawn.
            generator: CPU generator.
        """
        return self.views(images, sizes, generator, num_views=1)

    def views(
        self, images: Tensor, sizes: Tensor, generator: torch.Generator, *, num_views: int
    ) -> Tensor:
        """Return V independent views per image, [V * B, 3, s, s]: all first views, then all second.

        Args:
            images: [B, 3, H, W] uint8; not changed.
            sizes: [B, 2] original height and width.
            generator: CPU generator.
            num_views: V.
        """
        side = self.config.size_px
        out = torch.empty(num_views * len(images), 3, side, side, device=images.device)
        for part in out.chunk(num_views):
            self.render(images, sample_view_params(self.config, sizes, generator), out=part)
        return out

    def render(self, images: Tensor, params: ViewParams, *, out: Tensor | None = None) -> Tensor:
        """Return the views [B, 3, s, s] that `params` describe, written to `out` where given."""
        side = self.config.size_px
        if out is None:
            out = torch.empty(len(images), 3, side, side, device=images.device)
        boxes = scale_boxes(params.boxes, params.sizes, images.shape[2], images.shape[3])
        chunk = max(1, _CHUNK_VALUES // (3 * side * side))
        step = chunk if images.device.type == "cpu" else max(1, len(images))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for start in range(0, len(images), step):
                rows = slice(start, start + step)
                out[rows] = self._render(images[rows], boxes[rows], params.select(rows))
        return out

    def _render(self, images: Tensor, boxes: Tensor, params: ViewParams) -> Tensor:
        config = self.config
        views = resized_crop(images, boxes, config.size_px, flip=params.flip)
        views = colour_jitter(views, params, config.jitter)
        gray = params.grayscale.nonzero()[:, 0].to(views.device, non_blocking=True)
        if len(gray):
            views.index_copy_(0, gray, to_grayscale(views[gray]))
        return normalise(views, config.mean, config.std)
