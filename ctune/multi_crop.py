"""Multi-crop: two global and several local views per image, and where in the image each lies.

SwAV (arXiv 2006.09882), DINO (arXiv 2104.14294); boxes as udi.md 2.2. Parameters are drawn first,
so that boxes may be moved (`dataclasses.replace(params, boxes=...)`) before anything is rendered.

Shapes: B images, G global and L local crops; crops are stacked crop-major: all images' first crops,
then all second.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ctune.augment import Shard, ViewConfig, ViewParams, ViewPipeline


@dataclass(frozen=True)
class MultiCropConfig:
    """What the crops of one image are."""

    global_views: tuple[ViewConfig, ...]
    """One per global crop."""
    local_view: ViewConfig
    num_local: int
    """L; 0: global crops alone."""


@dataclass(frozen=True)
class MultiCropParams:
    """Parameters of all crops of B images."""

    global_crops: list[ViewParams]
    """G of B rows."""
    local_crops: list[ViewParams]
    """L of B rows."""

    def select(self, rows: Tensor | slice) -> "MultiCropParams":
        """Return the parameters of some of the images."""
        return MultiCropParams(
            [params.select(rows) for params in self.global_crops],
            [params.select(rows) for params in self.local_crops],
        )

    def boxes(self) -> Tensor:
        """Return every crop's `crop_box`, [G + L, B, 4]: the global crops first."""
        return torch.stack([view_box(p) for p in (*self.global_crops, *self.local_crops)])


class MultiCrop:
    """Draws and renders the crops of `MultiCropConfig`."""

    def __init__(self, config: MultiCropConfig) -> None:
        self.config = config
        self.global_pipeline = ViewPipeline(*config.global_views)
        self.local_pipeline = ViewPipeline(config.local_view)

    def draw(
        self, sizes: Tensor, generator: torch.Generator, *, shard: Shard | None = None
    ) -> MultiCropParams:
        """Return the parameters of all crops; as `ViewPipeline.draw`.

        Args:
            sizes: [B, 2] original height and width.
            generator: CPU generator.
            shard: where the images are in the global batch; None: they are all of it.
        """
        num_global = len(self.config.global_views)
        return MultiCropParams(
            self.global_pipeline.draw(sizes, generator, num_views=num_global, shard=shard),
            self.local_pipeline.draw(
                sizes, generator, num_views=self.config.num_local, shard=shard
            ),
        )

    def render(self, images: Tensor, params: MultiCropParams) -> tuple[Tensor, Tensor]:
        """Return global crops [G * B, 3, g, g] and local crops [L * B, 3, l, l].

        Args:
            images: [B, 3, H, W] uint8; not changed.
            params: of these images.
        """
        return (
            self.global_pipeline.render_all(images, params.global_crops),
            self.local_pipeline.render_all(images, params.local_crops),
        )


def view_box(params: ViewParams) -> Tensor:
    """Return where the views lie in their images, [B, 4] float64; see `crop_box`."""
    return crop_box(params.boxes, params.sizes, flip=params.flip, vflip=params.vflip)


def crop_box(boxes: Tensor, sizes: Tensor, *, flip: Tensor, vflip: Tensor) -> Tensor:
    """Return (top, left, bottom, right) of each crop's corner pixels, as shares of the image.

    The first pixel of a side is at 0, the last at 1; a mirrored crop has its edges swapped, so that
    the map from a place in the view to the place in the image stays linear (udi.md 2.2).

    Args:
        boxes: [B, 4] int64: top, left, height, width in pixels.
        sizes: [B, 2] int64 height and width of the images.
        flip: [B] bool: mirrored left-right.
        vflip: [B] bool: mirrored top-bottom.

    Returns:
        [B, 4] float64; an image side of one pixel counts as two, to have a length.
    """
    first, last = boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1
    length = (sizes - 1).clamp(min=1)
    first, last = first.double() / length, last.double() / length
    mirrored = torch.stack((vflip, flip), dim=1)
    return torch.cat((last.where(mirrored, first), first.where(mirrored, last)), dim=1)
