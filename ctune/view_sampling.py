"""What a random view is, and the parameters drawn for each image of a batch.

The parameters are drawn on the CPU from one generator, so a view is the same on every device. The
rules are those of `RandomResizedCrop`, `ColorJitter` and their like in `torchvision.transforms.v2`,
and timm's for RandAugment and random erasing.

Shapes: B images, sizes and boxes always as (height, width) and (top, left, height, width) in
pixels.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctune.geometry_ops import Interpolation
from ctune.randaugment import RandAugment, draw_operations

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]

_BOX_TRIES = 10
_QUARTER_TURN_DEGREES = 90.0
_ERASED_SHARE = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class ViewConfig:
    """What a random view is; operations are done in the order of the fields."""

    size_px: int
    """Side of the square view."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, drawn log-uniformly."""
    interpolation: Interpolation = "bilinear"
    """How the crop is resized, always with antialiasing."""
    pad_px: int | None = None
    """Instead of a random crop: the whole image resized, black so far around it, and a random
    window of the view's size (for small images; mae.md 2.2)."""
    flip_prob: float = 0.5
    """Mirror left-right."""
    vflip_prob: float = 0.0
    """Mirror top-bottom."""
    rotation_prob: float = 0.0
    rotation_degrees: float | None = None
    """r: turn by an angle from [-r, r]; None: by exactly 90 degrees counter-clockwise."""
    rand_augment: RandAugment | None = None
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue changes; hue at most 0.5."""
    jitter_prob: float = 0.0
    grayscale_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation; its kernel reaches 4 of the greatest."""
    solarise_prob: float = 0.0
    blur_solarise_mix: tuple[tuple[float, float, float], ...] = ()
    """Where given, instead of the two probabilities: (share of the views, blur, solarise)."""
    solarise_threshold: float = 128 / 255
    blur_before_grayscale: bool = False
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    erase_prob: float = 0.0
    """Random erasing of one box by normal noise (arXiv 1708.04896, timm's mode `pixel`)."""


@dataclass(frozen=True)
class ViewParams:
    """Parameters of B views; tensors on the CPU, one row per view."""

    sizes: Tensor
    """[B, 2] int64: original height and width, in whose pixels `boxes` are."""
    boxes: Tensor
    """[B, 4] int64: top, left, height, width of the crop."""
    shift: Tensor
    """[B, 2] int64: pixels of the view by which it is moved down and right, after `flip`."""
    flip: Tensor
    """[B] bool: mirrored left-right."""
    vflip: Tensor
    """[B] bool: mirrored top-bottom."""
    degrees: Tensor
    """[B] float32: turn, counter-clockwise."""
    operations: Tensor
    """[B, L] int64: RandAugment's operations, -1 none; L 0 without RandAugment."""
    arguments: Tensor
    """[B, L] float32: theirs."""
    jitter: Tensor
    """[B] bool: whether the colours are changed."""
    order: Tensor
    """[B, 4] int64: the operation at each place; 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    factors: Tensor
    """[B, 4] float32: brightness, contrast and saturation factor, hue shift in turns."""
    grayscale: Tensor
    """[B] bool."""
    blur_sigma_px: Tensor
    """[B] float32; 0: not blurred."""
    solarise: Tensor
    """[B] bool."""
    erase_boxes: Tensor
    """[B, 4] int64, in pixels of the view; height 0: nothing is erased."""
    erase_seeds: Tensor
    """[B] int64: the noise of the erased boxes."""

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, rows: Tensor | slice) -> "ViewParams":
        """Return the parameters of some of the views."""
        return ViewParams(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class Shard:
    """Which rows of the global batch a batch holds: `start` and the rows after it, of `total`."""

    start: int
    total: int


class _Draws:
    """Random numbers for the rows of a shard, drawn for the whole global batch."""

    def __init__(self, count: int, shard: Shard | None, generator: torch.Generator) -> None:
        shard = shard or Shard(0, count)
        if not 0 <= shard.start <= shard.total - count:
            raise ValueError(f"{count} rows from {shard.start} exceed a batch of {shard.total}")
        self.count = count
        self._rows = slice(shard.start, shard.start + count)
        self._total = shard.total
        self._generator = generator

    def uniform(self, columns: int) -> Tensor:
        """Return [B, columns] float64 in [0, 1)."""
        shape = (self._total, columns)
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)[self._rows]

    def normal(self, columns: int) -> Tensor:
        """Return [B, columns] float64, standard normal."""
        shape = (self._total, columns)
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)[self._rows]

    def seeds(self) -> Tensor:
        """Return [B] int64."""
        high = 2**63 - 1
        return torch.randint(high, (self._total,), generator=self._generator)[self._rows]


def sample_view_params(
    config: ViewConfig, sizes: Tensor, generator: torch.Generator, *, shard: Shard | None = None
) -> ViewParams:
    """Draw the parameters of one view per image.

    The draws of a call depend on the generator, on the configuration and on the number of images
    of the global batch alone, never on outcomes; so several processes draw what one would.

    Args:
        config: distributions.
        sizes: [B, 2] original height and width.
        generator: CPU generator.
        shard: where the images are in the global batch; None: they are all of it.

    Raises:
        ValueError: the shard reaches beyond the global batch.
    """
    sizes = sizes.to(device="cpu", dtype=torch.int64)
    draws = _Draws(len(sizes), shard, generator)
    boxes, shift = _sample_crop(config, sizes, draws)
    chances = draws.uniform(8)
    brightness, contrast, saturation, hue = config.jitter
    low = torch.tensor([max(0.0, 1 - v) for v in (brightness, contrast, saturation)] + [-hue])
    high = torch.tensor([1 + brightness, 1 + contrast, 1 + saturation, hue])
    order, factors = draws.uniform(4).argsort(dim=1), low + (high - low) * draws.uniform(4)
    turn, sigma = draws.uniform(2).unbind(1)
    blur_prob, solarise_prob = _blur_and_solarise(config, chances[:, 7].contiguous())
    operations, arguments = _sample_operations(config, draws)
    erase_boxes, erase_seeds = _sample_erasing(config, draws)
    return ViewParams(
        sizes=sizes,
        boxes=boxes,
        shift=shift,
        flip=chances[:, 0] < config.flip_prob,
        vflip=chances[:, 3] < config.vflip_prob,
        degrees=_degrees(config, turn).where(chances[:, 4] < config.rotation_prob, 0).float(),
        operations=operations,
        arguments=arguments,
        jitter=chances[:, 1] < config.jitter_prob,
        order=order,
        factors=factors.float(),
        grayscale=chances[:, 2] < config.grayscale_prob,
        blur_sigma_px=_between(config.blur_sigma_px, sigma)
        .where(chances[:, 5] < blur_prob, 0)
        .float(),
        solarise=chances[:, 6] < solarise_prob,
        erase_boxes=erase_boxes,
        erase_seeds=erase_seeds,
    )


def _between(limits: tuple[float, float], draw: Tensor) -> Tensor:
    low, high = limits
    return low + (high - low) * draw


def _degrees(config: ViewConfig, draw: Tensor) -> Tensor:
    if config.rotation_degrees is None:
        return torch.full_like(draw, _QUARTER_TURN_DEGREES)
    return _between((-config.rotation_degrees, config.rotation_degrees), draw)


def _blur_and_solarise(config: ViewConfig, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Return each view's probabilities [B]."""
    mix = config.blur_solarise_mix or ((1.0, config.blur_prob, config.solarise_prob),)
    shares, blur, solarise = torch.tensor(mix, dtype=torch.float64).unbind(1)
    part = torch.searchsorted(shares.cumsum(0), draw, right=True).clamp(max=len(mix) - 1)
    return blur[part], solarise[part]


def _sample_operations(config: ViewConfig, draws: _Draws) -> tuple[Tensor, Tensor]:
    if config.rand_augment is None:
        return torch.empty(draws.count, 0, dtype=torch.int64), torch.empty(draws.count, 0)
    layers = config.rand_augment.num_layers
    uniform = draws.uniform(3 * layers)
    return draw_operations(config.rand_augment, uniform=uniform, normal=draws.normal(layers))


def _sample_crop(config: ViewConfig, sizes: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
    """Return boxes and shifts."""
    if config.pad_px is None:
        boxes = _sample_boxes(config, sizes.numpy(), draws.uniform(4 * _BOX_TRIES).numpy())
        return torch.from_numpy(boxes), torch.zeros_like(sizes)
    whole = torch.cat((torch.zeros_like(sizes), sizes), dim=1)
    return whole, (draws.uniform(2) * (2 * config.pad_px + 1)).long() - config.pad_px


def _sample_boxes(config: ViewConfig, sizes: Integers, draws: Reals) -> Integers:
    """Torchvision's rule: the first of ten boxes that fits, else the largest central one."""
    chosen, fits = _first_fitting(config.scale, config.ratio, sizes=sizes, draws=draws)
    return np.where(fits[:, None], chosen, _central_boxes(config, sizes))


def _first_fitting(
    scale: tuple[float, float], ratio: tuple[float, float], *, sizes: Integers, draws: Reals
) -> tuple[Integers, NDArray[np.bool_]]:
    """Return the first of each row's boxes that fits into its image [B, 4], and whether one does.

    In numpy: torch spreads exp and sqrt of a few numbers over threads, see `ctune.core_threads`.
    """
    heights, widths = sizes[:, :1], sizes[:, 1:]
    area_draw, ratio_draw, top_draw, left_draw = np.split(draws, 4, axis=1)
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * area_draw)
    log_low, log_high = np.log(ratio)
    shape = np.exp(log_low + (log_high - log_low) * ratio_draw)
    w = np.rint(np.sqrt(area * shape)).astype(np.int64)
    h = np.rint(np.sqrt(area / shape)).astype(np.int64)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    top = (top_draw * (heights - h + 1)).astype(np.int64)
    left = (left_draw * (widths - w + 1)).astype(np.int64)
    tries = np.stack((top, left, h, w), axis=2)
    return tries[np.arange(len(sizes)), fits.argmax(axis=1)], fits.any(axis=1)


def _central_boxes(config: ViewConfig, sizes: Integers) -> Integers:
    heights, widths = sizes.T
    narrowest, widest = config.ratio
    in_ratio = widths / heights
    h = np.where(in_ratio < narrowest, np.rint(widths / narrowest), heights).astype(np.int64)
    w = np.where(in_ratio > widest, np.rint(heights * widest), widths).astype(np.int64)
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    return np.stack(((heights - h) // 2, (widths - w) // 2, h, w), axis=1)


def _sample_erasing(config: ViewConfig, draws: _Draws) -> tuple[Tensor, Tensor]:
    """timm's rule: the first of ten boxes that fits, else none."""
    if not config.erase_prob:
        none = torch.zeros(draws.count, 5, dtype=torch.int64)
        return none[:, :4], none[:, 4]
    sizes = np.full((draws.count, 2), config.size_px, dtype=np.int64)
    wanted = draws.uniform(1).numpy()[:, 0] < config.erase_prob
    tries = draws.uniform(4 * _BOX_TRIES).numpy()
    boxes, fits = _first_fitting(_ERASED_SHARE, _ERASED_RATIO, sizes=sizes, draws=tries)
    boxes = np.where((wanted & fits)[:, None], boxes, 0)
    return torch.from_numpy(boxes), draws.seeds()
