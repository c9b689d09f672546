"""What is drawn: torchvision's and timm's distributions, the same for every split of a batch."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from ctune.augment import (
    Shard,
    ViewConfig,
    ViewPipeline,
    sample_view_params,
)
from tests.ctune.pictures import EVERYTHING, LACVIT, assert_near, generator


def test_same_seed_same_parameters_and_other_seed_others() -> None:
    sizes = torch.full((64, 2), 32)
    first, again = (sample_view_params(EVERYTHING, sizes, generator(3)) for _ in range(2))
    other = sample_view_params(EVERYTHING, sizes, generator(4))
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name))
        if name not in ("sizes", "shift"):  # these are not drawn here
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_shards_draw_what_one_process_draws() -> None:
    sizes = torch.stack((torch.arange(20, 30), torch.arange(40, 30, -1)), dim=1)
    pipeline = ViewPipeline(EVERYTHING)
    whole = pipeline.draw(sizes, generator(3), num_views=2)
    for start, end in ((0, 4), (4, 10)):
        part = pipeline.draw(
            sizes[start:end], generator(3), num_views=2, shard=Shard(start, len(sizes))
        )
        for mine, all_rows in zip(part, whole, strict=True):
            for name, expected in vars(all_rows.select(slice(start, end))).items():
                assert torch.equal(getattr(mine, name), expected), name


def test_a_shard_beyond_its_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows from 3 exceed a batch of 4"):
        ViewPipeline(LACVIT).draw(
            torch.full((2, 2), 32), generator(), num_views=1, shard=Shard(3, 4)
        )


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (120, 80), (30, 200), (200, 30)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Means and deciles of all four box values over 4,000 draws, in shares of the side."""
    count = 4000
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(32, scale=(0.2, 1.0))
    image = torch.empty(3, *size)
    drawn = [crop.make_params([image]) for _ in range(count)]
    keys = ("top", "left", "height", "width")
    theirs = torch.tensor([[float(d[key]) for key in keys] for d in drawn])
    sizes = torch.tensor(size).expand(count, 2)
    ours = sample_view_params(LACVIT, sizes, generator()).boxes.float()
    scale = torch.tensor([*size, *size])
    levels = torch.linspace(0.1, 0.9, 9)
    assert_near(ours.mean(0) / scale, theirs.mean(0) / scale, 0.015)
    assert_near(ours.quantile(levels, 0) / scale, theirs.quantile(levels, 0) / scale, 0.05)


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (10, 500), (500, 10)])
def test_fallback_is_torchvisions_central_crop(size: tuple[int, int]) -> None:
    config = replace(LACVIT, scale=(1.0, 1.0))
    crop = v2.RandomResizedCrop(32, scale=(1.0, 1.0))
    expected = crop.make_params([torch.empty(3, *size)])
    box = sample_view_params(config, torch.tensor([size]), generator()).boxes[0].tolist()
    assert box == [expected[key] for key in ("top", "left", "height", "width")]


def test_probabilities_factors_and_orders() -> None:
    count = 20_000
    params = sample_view_params(LACVIT, torch.full((count, 2), 32), generator())
    for name, expected in (("flip", 0.5), ("jitter", 0.8), ("grayscale", 0.2)):
        assert abs(getattr(params, name).float().mean().item() - expected) < 0.015
    low, high = params.factors.amin(0), params.factors.amax(0)
    assert_near(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), 1e-3)
    assert_near(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), 1e-3)
    assert_near(params.factors.mean(0), torch.tensor([1.0, 1.0, 1.0, 0.0]), 0.01)
    counts = Counter(map(tuple, params.order.tolist()))
    assert len(counts) == 24
    assert min(counts.values()) > count / 24 * 0.85


def test_strong_jitter_never_has_negative_factors() -> None:
    config = replace(LACVIT, jitter=(2.0, 2.0, 2.0, 0.5))
    params = sample_view_params(config, torch.full((2000, 2), 32), generator())
    assert params.factors[:, :3].min() >= 0


def test_probabilities_of_the_further_operations() -> None:
    count = 20_000
    params = sample_view_params(EVERYTHING, torch.full((count, 2), 32), generator())
    drawn = {
        0.3: params.vflip,
        0.4: params.degrees != 0,
        0.5: params.blur_sigma_px > 0,
        0.1: params.solarise,
    }
    for probability, chosen in drawn.items():
        assert abs(chosen.float().mean().item() - probability) < 0.015
    degrees = params.degrees[params.degrees != 0]
    sigmas = params.blur_sigma_px[params.blur_sigma_px > 0]
    for values, low, high in ((degrees, -30.0, 30.0), (sigmas, 0.1, 2.0)):
        scaled = (values - low) / (high - low)
        levels = torch.linspace(0, 1, 11)
        assert_near(scaled.quantile(levels), levels, 0.02)


def test_without_degrees_a_rotation_is_a_quarter_turn() -> None:
    config = ViewConfig(size_px=8, rotation_prob=0.5)
    degrees = sample_view_params(config, torch.full((100, 2), 8), generator()).degrees
    assert set(degrees.tolist()) == {0.0, 90.0}


def test_blur_and_solarise_of_a_mix_come_together() -> None:
    """Parts of the views: half always blurred, half never blurred but always solarised."""
    config = ViewConfig(size_px=8, blur_solarise_mix=((0.5, 1.0, 0.0), (0.5, 0.0, 1.0)))
    params = sample_view_params(config, torch.full((2000, 2), 8), generator())
    blurred = params.blur_sigma_px > 0
    assert torch.equal(blurred, ~params.solarise)
    assert abs(blurred.float().mean().item() - 0.5) < 0.05


def test_erased_boxes_are_distributed_as_timms() -> None:
    count, side = 4000, 32
    config = ViewConfig(size_px=side, erase_prob=1.0)
    boxes = sample_view_params(config, torch.full((count, 2), side), generator()).erase_boxes
    torch.manual_seed(0)
    random.seed(0)
    erasing = RandomErasing(probability=1.0, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]
    erased = erasing(torch.zeros(count, 1, side, side))[:, 0] != 0
    assert ((boxes[:, :2] + boxes[:, 2:]) <= side).all()
    heights, widths = erased.any(2).sum(1).float(), erased.any(1).sum(1).float()
    tops = erased.any(2).float().argmax(1).float()
    for mine, theirs in ((boxes[:, 2], heights), (boxes[:, 3], widths), (boxes[:, 0], tops)):
        assert abs(mine.float().mean() - theirs.mean()) / side < 0.02
        levels = torch.linspace(0.1, 0.9, 9)
        assert_near(mine.float().quantile(levels) / side, theirs.quantile(levels) / side, 0.05)
