"""Random views of whole batches on the device, each image with its own parameters.

The parameters are drawn on the CPU (`ctune.view_sampling`); the pixels are computed where the
images are (`ctune.geometry_ops`, `ctune.pixel_ops`, `ctune.randaugment`).

Shapes: B images, V views, s output side, sizes and boxes always as (height, width) and (top, left,
height, width) in pixels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ctune.core_threads import run_tasks
from ctune.geometry_ops import LARGE_VIEW_PX, resized_crop, rotate, translate, vflip
from ctune.pixel_ops import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_to_rows,
    erase,
    gaussian_blur,
    normalise,
    solarise,
    to_grayscale,
)
from ctune.randaugment import apply_operations
from ctune.view_sampling import (
    Shard,
    ViewConfig,
    ViewParams,
    sample_view_params,
)

__all__ = [
    "Shard",
    "ViewConfig",
    "ViewParams",
    "ViewPipeline",
    "colour_jitter",
    "sample_view_params",
    "scale_boxes",
]

_CHUNK_VALUES = 2**18
"""Values of a chunk of views on the CPU: they stay in the cache between operations."""
_BLUR_REACH = 4
"""Half of the blur's kernel, in the greatest standard deviation: 0.006 % of the weight is cut."""
_DRAWN = (
    "scale",
    "ratio",
    "pad_px",
    "flip_prob",
    "vflip_prob",
    "rotation_prob",
    "rotation_degrees",
    "rand_augment",
    "jitter_prob",
    "grayscale_prob",
    "blur_prob",
    "solarise_prob",
    "blur_solarise_mix",
    "erase_prob",
)
"""Fields that say how parameters are drawn; views of one pipeline may differ in these alone."""


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
        views = apply_to_rows(views, rows, _JITTER[index], factors[rows, index])
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


class ViewPipeline:
    """Random views of batches; see `ViewConfig` for what is done, in which order.

    Args:
        configs: one for all views, or one per view where they are drawn differently (BYOL).

    Raises:
        ValueError: the configs differ in more than what is drawn: in size, colour strengths, ...
    """

    def __init__(self, *configs: ViewConfig) -> None:
        self.config = configs[0]
        self.configs = configs
        drawn = {name: getattr(self.config, name) for name in _DRAWN}
        if any(replace(other, **drawn) != self.config for other in configs):
            raise ValueError(f"views of one pipeline may differ in {', '.join(_DRAWN)} alone")

    def __call__(
        self,
        images: Tensor,
        sizes: Tensor,
        generator: torch.Generator,
        *,
        shard: Shard | None = None,
    ) -> Tensor:
        """Return one view [B, 3, s, s] float32 per image, normalised, on the images' device.

        Args:
            images: [B, 3, H, W] uint8; not changed.
            sizes: [B, 2] original height and width: the geometry in which crops are drawn.
            generator: CPU generator.
            shard: where the images are in the global batch; None: they are all of it.

        Raises:
            ValueError: as `draw`.
        """
        return self.views(images, sizes, generator, num_views=1, shard=shard)

    def views(
        self,
        images: Tensor,
        sizes: Tensor,
        generator: torch.Generator,
        *,
        num_views: int,
        shard: Shard | None = None,
    ) -> Tensor:
        """Return V independent views per image, [V * B, 3, s, s]: all first views, then all second.

        Args:
            images: [B, 3, H, W] uint8; not changed.
            sizes: [B, 2] original height and width.
            generator: CPU generator.
            num_views: V.
            shard: where the images are in the global batch; None: they are all of it.

        Raises:
            ValueError: as `draw`.
        """
        drawn = self.draw(sizes, generator, num_views=num_views, shard=shard)
        return self.render_all(images, drawn)

    def draw(
        self,
        sizes: Tensor,
        generator: torch.Generator,
        *,
        num_views: int,
        shard: Shard | None = None,
    ) -> list[ViewParams]:
        """Return the parameters of each of V views, B rows each.

        Args:
            sizes: [B, 2] original height and width.
            generator: CPU generator.
            num_views: V.
            shard: where the images are in the global batch; None: they are all of it. Processes
                with equal generators draw for their shards what one draws for the whole batch.

        Raises:
            ValueError: the pipeline has one config per view, but not for V of them; or the shard
                reaches beyond the global batch.
        """
        if len(self.configs) not in (1, num_views):
            raise ValueError(f"{num_views} views asked of a pipeline of {len(self.configs)} views")
        configs = self.configs if len(self.configs) == num_views else self.configs * num_views
        return [sample_view_params(config, sizes, generator, shard=shard) for config in configs]

    def render(self, images: Tensor, params: ViewParams) -> Tensor:
        """Return the views [B, 3, s, s] that `params` describe."""
        return self.render_all(images, [params])

    def render_all(self, images: Tensor, params: Sequence[ViewParams]) -> Tensor:
        """Return the views [V * B, 3, s, s] that V `params` describe: all first, then all second.

        Args:
            images: [B, 3, H, W] uint8; not changed.
            params: V of B rows.
        """
        side = self.config.size_px
        out = torch.empty(len(params), len(images), 3, side, side, device=images.device)
        views = zip(params, out, strict=True)
        self._run([task for drawn, part in views for task in self._tasks(images, drawn, part)])
        return out.flatten(0, 1)

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
            views = resized_crop(
                images,
                boxes,
                config.size_px,
                flip=params.flip,
                interpolation=config.interpolation,
            )
            views = _change(views, params.shift.any(dim=1), translate, params.shift)
            views = _change(views, params.vflip, vflip)
            views = _change(views, params.degrees != 0, rotate, params.degrees)
            views = apply_operations(views, params.operations, params.arguments, fill=config.mean)
            views = colour_jitter(views, params, config.jitter)
            if config.blur_before_grayscale:
                views = self._blur(views, params.blur_sigma_px)
            views = _change(views, params.grayscale, to_grayscale)
            if not config.blur_before_grayscale:
                views = self._blur(views, params.blur_sigma_px)
            threshold = torch.full((len(views),), config.solarise_threshold)
            views = _change(views, params.solarise, solarise, threshold)
            normalise(views, config.mean, config.std, out=out)
            erase(out, params.erase_boxes, params.erase_seeds)

    def _blur(self, views: Tensor, sigma_px: Tensor) -> Tensor:
        reach = math.ceil(_BLUR_REACH * self.config.blur_sigma_px[1])
        blur = functools.partial(gaussian_blur, radius_px=min(reach, self.config.size_px - 1))
        return _change(views, sigma_px > 0, blur, sigma_px)


def _change(
    views: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor
) -> Tensor:
    """Apply an operation to the chosen views; `chosen` and parameters are [B] on the CPU."""
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return views
    given = [parameter[rows].to(views.device, non_blocking=True) for parameter in parameters]
    return apply_to_rows(views, rows.to(views.device, non_blocking=True), operation, *given)
