"""Random views of whole batches on the device, each image with its own parameters.

The parameters of a batch are drawn on the CPU from one generator, so a view is the same on every
device; the pixels are computed where the images are (`ctune.pixel_ops`). The sampling rules are
those of `RandomResizedCrop`, `RandomHorizontalFlip`, `ColorJitter` and `RandomGrayscale` in
`torchvision.transforms.v2`.

Shapes: B images, s output side, sizes and boxes always as (height, width) and (top, left, height,
width) in pixels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctune.core_threads import run_tasks
from ctune.pixel_ops import (
    LARGE_VIEW_PX,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    normalise,
    resized_crop,
    to_grayscale,
)

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]

_CROP_TRIES = 10
_CHUNK_VALUES = 2**18
"""Values of a chunk of views on the CPU: they stay in the cache between operations."""


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

    boxes = _sample_boxes(config, sizes.numpy(), uniform(4 * _CROP_TRIES).numpy())
    chances = uniform(3)
    brightness, contrast, saturation, hue = config.jitter
    low = torch.tensor([max(0.0, 1 - v) for v in (brightness, contrast, saturation)] + [-hue])
    high = torch.tensor([1 + brightness, 1 + contrast, 1 + saturation, hue])
    return ViewParams(
        sizes=sizes,
        boxes=torch.from_numpy(boxes),
        flip=chances[:, 0] < config.flip_prob,
        jitter=chances[:, 1] < config.jitter_prob,
        order=uniform(4).argsort(dim=1),
        factors=(low + (high - low) * uniform(4)).float(),
        grayscale=chances[:, 2] < config.grayscale_prob,
    )


def _sample_boxes(config: ViewConfig, sizes: Integers, draws: Reals) -> Integers:
    """Torchvision's rule: the first of ten boxes that fits, else the largest central one.

    In numpy: torch spreads exp and sqrt of a few numbers over threads, see `ctune.core_threads`.
    """
    heights, widths = sizes[:, :1], sizes[:, 1:]
    area_draw, ratio_draw, top_draw, left_draw = np.split(draws, 4, axis=1)
    low, high = config.scale
    area = heights * widths * (low + (high - low) * area_draw)
    log_low, log_high = np.log(config.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * ratio_draw)
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    top = (top_draw * (heights - h + 1)).astype(np.int64)
    left = (left_draw * (widths - w + 1)).astype(np.int64)
    tries = np.stack((top, left, h, w), axis=2)
    chosen = tries[np.arange(len(sizes)), fits.argmax(axis=1)]
    return np.where(fits.any(axis=1, keepdims=True), chosen, _central_boxes(config, sizes))


def _central_boxes(config: ViewConfig, sizes: Integers) -> Integers:
    heights, widths = sizes.T
    narrowest, widest = config.ratio
    in_ratio = widths / heights
    h = np.where(in_ratio < narrowest, np.rint(widths / narrowest), heights).astype(np.int64)
    w = np.where(in_ratio > widest, np.rint(heights * widest), widths).astype(np.int64)
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    return np.stack(((heights - h) // 2, (widths - w) // 2, h, w), axis=1)


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
    groups = _group_rows(params, strength)
    if not groups:
        return images
    views = images.clone() if len(images) > 1 else images
    numbers = [row for _, rows in groups for row in rows]
    all_rows = torch.tensor(numbers).to(images.device, non_blocking=True)
    factors = params.factors.to(images.device, non_blocking=True)
    parts = torch.split_with_sizes(all_rows, [len(rows) for _, rows in groups])
    for (index, _), rows in zip(groups, parts, strict=True):
        views = _apply_to_rows(views, rows, _JITTER[index], factors[rows, index])
    return views


def _group_rows(params: ViewParams, strength: tuple[float, ...]) -> list[tuple[int, list[int]]]:
    """Return (operation, rows it is applied to), place after place of the views' orders."""
    orders = params.order.tolist()
    jittered = [row for row, wanted in enumerate(params.jitter.tolist()) if wanted]
    groups = []
    for place in range(4):
        rows: list[list[int]] = [[], [], [], []]
        for row in jittered:
            rows[orders[row][place]].append(row)
        groups += [(i, rows[i]) for i in range(4) if rows[i] and strength[i] > 0]
    return groups


def _apply_to_rows(
    views: Tensor, rows: Tensor, operation: Callable[..., Tensor], *factors: Tensor
) -> Tensor:
    """Change some rows in place, or return a changed copy of all; factors are those of `rows`."""
    if len(rows) == len(views):
        return operation(views, *factors)
    return views.index_copy_(0, rows, operation(views[rows], *factors))


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
        parts = out.chunk(num_views)
        drawn = [sample_view_params(self.config, sizes, generator) for _ in parts]
        self._run([t for p, o in zip(drawn, parts, strict=True) for t in self._tasks(images, p, o)])
        return out

    def render(self, images: Tensor, params: ViewParams) -> Tensor:
        """Return the views [B, 3, s, s] that `params` describe."""
        side = self.config.size_px
        out = torch.empty(len(images), 3, side, side, device=images.device)
        self._run(self._tasks(images, params, out))
        return out

    def _run(self, tasks: list[Callable[[], None]]) -> None:
        run_tasks(tasks, spread=self.config.size_px >= LARGE_VIEW_PX)

    def _tasks(self, images: Tensor, params: ViewParams, out: Tensor) -> list[Callable[[], None]]:
        """Return the work in parts: the whole batch on a GPU, chunks of it on the CPU."""
        boxes = scale_boxes(params.boxes, params.sizes, images.shape[2], images.shape[3])
        chunk = max(1, _CHUNK_VALUES // out[0].numel()) if len(images) else 1
        step = chunk if images.device.type == "cpu" else max(1, len(images))
        return [
            functools.partial(
                self._render, images[rows], boxes[rows], params.select(rows), out=out[rows]
            )
            for rows in (slice(at, at + step) for at in range(0, len(images), step))
        ]

    @torch.no_grad()
    def _render(self, images: Tensor, boxes: Tensor, params: ViewParams, *, out: Tensor) -> None:
        config = self.config
        with torch.autocast(images.device.type, enabled=False):
            views = resized_crop(images, boxes, config.size_px, flip=params.flip)
            views = colour_jitter(views, params, config.jitter)
            gray = params.grayscale.nonzero()[:, 0].to(views.device, non_blocking=True)
            if len(gray):
                views = _apply_to_rows(views, gray, to_grayscale)
            normalise(views, config.mean, config.std, out=out)
