"""Whole views: torchvision's operations one after the other, for identical parameters."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ctune.augment import (
    ViewConfig,
    ViewParams,
    ViewPipeline,
    colour_jitter,
    sample_view_params,
    scale_boxes,
)
from ctune.view_presets import VIEW_PRESETS
from tests.ctune.pictures import (
    EVERYTHING,
    LACVIT,
    MEAN,
    STD,
    TOLERANCE,
    as_float,
    assert_near,
    generator,
    random_images,
)

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def test_images_of_one_pixel_height() -> None:
    config = replace(LACVIT, size_px=8)
    sizes = torch.tensor([[1, 100], [100, 1], [1, 1]])
    for seed in range(20):
        params = sample_view_params(config, sizes, generator(seed))
        assert (params.boxes[:, 2:] >= 1).all()
        assert (params.boxes[:, :2] + params.boxes[:, 2:] <= sizes).all()
    for height, width in sizes.tolist():
        view = ViewPipeline(config)(
            random_images(1, height, width), torch.tensor([[height, width]]), generator()
        )
        assert view.shape == (1, 3, 8, 8)
        assert view.isfinite().all()


def test_boxes_are_carried_over_to_the_stored_size() -> None:
    sizes = torch.tensor([[400, 600], [10, 20], [64, 64]])
    boxes = torch.tensor([[100, 150, 200, 300], [9, 19, 1, 1], [5, 6, 20, 30]])
    scaled = scale_boxes(boxes, sizes, 64, 64)
    assert scaled.tolist() == [[16, 16, 32, 32], [58, 61, 6, 3], [5, 6, 20, 30]]
    tiny = scale_boxes(torch.tensor([[999, 0, 1, 1000]]), torch.tensor([[1000, 1000]]), 8, 8)
    assert tiny.tolist() == [[7, 0, 1, 8]]


def torchvision_view(image: Tensor, params: ViewParams, row: int, config: ViewConfig) -> Tensor:
    """The same view by torchvision's functions, one image at a time."""
    size, mode = [config.size_px, config.size_px], InterpolationMode(config.interpolation)
    box = params.boxes[row].tolist()
    view = F.resized_crop(as_float(image), *box, size, mode, antialias=True).clamp(0, 1)
    if params.flip[row]:
        view = F.horizontal_flip(view)
    if params.vflip[row]:
        view = F.vertical_flip(view)
    view = F.rotate(view, float(params.degrees[row]))
    if params.jitter[row]:
        for index in params.order[row].tolist():
            view = JITTER[index](view, float(params.factors[row, index]))
    sigma = float(params.blur_sigma_px[row])
    reach = min(math.ceil(4 * config.blur_sigma_px[1]), config.size_px - 1)
    if sigma and config.blur_before_grayscale:
        view = F.gaussian_blur(view, [2 * reach + 1] * 2, [sigma, sigma])
    if params.grayscale[row]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if sigma and not config.blur_before_grayscale:
        view = F.gaussian_blur(view, [2 * reach + 1] * 2, [sigma, sigma])
    if params.solarise[row]:
        view = F.solarize(view, config.solarise_threshold)
    normalised: Tensor = F.normalize(view, list(config.mean), list(config.std))
    return normalised


@pytest.mark.parametrize("size_px", [32, 80])
def test_views_equal_torchvision_in_all_orders(size_px: int) -> None:
    """5e-5: rounding of a hue near grey is scaled by later operations and by 1 / std."""
    config = replace(LACVIT, size_px=size_px)
    orders = torch.tensor(list(itertools.permutations(range(4))) * 3)
    images = random_images(len(orders), 48, 48)
    params = sample_view_params(config, torch.full((len(orders), 2), 48), generator(1))
    params = replace(params, order=orders)
    views = ViewPipeline(config).render(images, params)
    expected = [torchvision_view(image, params, i, config) for i, image in enumerate(images)]
    assert_near(views, torch.stack(expected), 5e-5)


@pytest.mark.parametrize("name", ["simclr", "byol", "mae_minimal"])
@pytest.mark.parametrize("size_px", [20, 80])
def test_views_of_presets_equal_torchvision(name: str, size_px: int) -> None:
    """A value within rounding of the threshold may be solarised by one and not by the other."""
    images = random_images(24, 48, 48)
    pipeline = ViewPipeline(*VIEW_PRESETS[name](size_px, mean=MEAN, std=STD))
    drawn = pipeline.draw(torch.full((24, 2), 48), generator(1), num_views=2)
    for params in drawn:
        views = pipeline.render(images, params)
        rows = [torchvision_view(im, params, i, pipeline.config) for i, im in enumerate(images)]
        other = (views - torch.stack(rows)).abs() > 5e-5
        assert other.float().mean() < 1e-4


def test_views_with_vertical_flips_and_turns_equal_torchvision() -> None:
    config = replace(LACVIT, size_px=31, vflip_prob=0.5, rotation_prob=0.5, solarise_prob=0.5)
    images = random_images(24, 48, 48)
    params = sample_view_params(config, torch.full((24, 2), 48), generator(1))
    views = ViewPipeline(config).render(images, params)
    rows = [torchvision_view(image, params, i, config) for i, image in enumerate(images)]
    assert ((views - torch.stack(rows)).abs() > 5e-5).float().mean() < 1e-4


def test_padded_crops_are_windows_of_the_padded_image() -> None:
    config = ViewConfig(size_px=16, pad_px=4, flip_prob=0.0)
    images = random_images(200, 16, 16)
    params = sample_view_params(config, torch.full((200, 2), 16), generator())
    views = ViewPipeline(config).render(images, params)
    padded = F.pad(as_float(images), [4, 4, 4, 4])
    for view, image, (down, right) in zip(views, padded, params.shift.tolist(), strict=True):
        top, left = 4 - down, 4 - right
        assert_near(view, image[:, top : top + 16, left : left + 16])
    assert set(params.shift.flatten().tolist()) == set(range(-4, 5))


def test_two_kinds_of_views_are_drawn_each_by_its_own_config() -> None:
    first = replace(LACVIT, blur_prob=1.0)
    second = replace(LACVIT, blur_prob=0.0, solarise_prob=1.0)
    pipeline = ViewPipeline(first, second)
    sizes = torch.full((8, 2), 32)
    drawn = pipeline.draw(sizes, generator(), num_views=2)
    assert (drawn[0].blur_sigma_px > 0).all()
    assert not drawn[0].solarise.any()
    assert not drawn[1].blur_sigma_px.any()
    assert drawn[1].solarise.all()
    images = random_images(8, 32, 32)
    both = pipeline.views(images, sizes, generator(), num_views=2)
    assert torch.equal(both[:8], pipeline.render(images, drawn[0]))
    with pytest.raises(ValueError, match="3 views asked of a pipeline of 2 views"):
        pipeline.draw(sizes, generator(), num_views=3)
    with pytest.raises(ValueError, match="may differ in scale"):
        ViewPipeline(first, replace(second, size_px=16))


def test_erased_boxes_are_noise_after_normalisation() -> None:
    config = replace(LACVIT, size_px=40, erase_prob=1.0)
    images = random_images(6, 48, 48)
    params = sample_view_params(config, torch.full((6, 2), 48), generator())
    views = ViewPipeline(config).render(images, params)
    whole = replace(params, erase_boxes=torch.zeros_like(params.erase_boxes))
    changed = views != ViewPipeline(config).render(images, whole)
    for row, (top, left, height, width) in enumerate(params.erase_boxes.tolist()):
        assert changed[row, :, top : top + height, left : left + width].all()
        assert changed[row].count_nonzero() == 3 * height * width


def test_same_seed_same_views() -> None:
    images, sizes = random_images(8, 32, 32), torch.full((8, 2), 32)
    first, again = (ViewPipeline(LACVIT)(images, sizes, generator(5)) for _ in range(2))
    assert torch.equal(first, again)


def test_two_views_are_view_major_and_independent() -> None:
    images, sizes = random_images(8, 32, 32), torch.full((8, 2), 32)
    pipeline, draws = ViewPipeline(LACVIT), generator(5)
    both = pipeline.views(images, sizes, generator(5), num_views=2)
    assert torch.equal(both[:8], pipeline(images, sizes, draws))
    assert torch.equal(both[8:], pipeline(images, sizes, draws))
    assert not torch.equal(both[:8], both[8:])


@pytest.mark.parametrize("size_px", [32, 80])
def test_other_images_of_the_batch_do_not_matter(size_px: int) -> None:
    """1e-6: matrix products of other shapes may sum in another order."""
    config = replace(EVERYTHING, size_px=size_px)
    images = random_images(30, 48, 48)
    params = sample_view_params(config, torch.full((30, 2), 48), generator(2))
    views = ViewPipeline(config).render(images, params)
    for rows in (torch.arange(29, -1, -1), torch.tensor([7]), torch.tensor([3, 3, 11])):
        again = ViewPipeline(config).render(images[rows], params.select(rows))
        assert_near(again, views[rows], 1e-6)


@pytest.mark.parametrize("size_px", [32, 80])
def test_the_source_images_stay_as_they_are(size_px: int) -> None:
    images, sizes = random_images(16, 48, 48), torch.full((16, 2), 48)
    untouched = images.clone()
    ViewPipeline(replace(LACVIT, size_px=size_px)).views(images, sizes, generator(), num_views=2)
    assert torch.equal(images, untouched)


def test_operations_of_strength_0_are_left_out() -> None:
    images = as_float(random_images(8, 16, 16))
    params = sample_view_params(LACVIT, torch.full((8, 2), 16), generator())
    assert torch.equal(colour_jitter(images, params, (0.0, 0.0, 0.0, 0.0)), images)
    params = replace(params, jitter=torch.zeros(8, dtype=torch.bool))
    assert torch.equal(colour_jitter(images, params, LACVIT.jitter), images)


def test_grey_images_stay_grey() -> None:
    grey = random_images(16, 32, 32)[:, :1].expand(-1, 3, -1, -1).contiguous()
    config = replace(LACVIT, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    views = ViewPipeline(config)(grey, torch.full((16, 2), 32), generator())
    assert_near(views, views[:, :1].expand_as(views))
    assert 0 <= views.min() <= views.max() <= 1 + TOLERANCE


def test_crops_are_drawn_in_the_original_geometry() -> None:
    """A picture twice as wide as high, stored as a square, keeps its crops' true proportions."""
    count = 2000
    sizes = torch.tensor([100, 200]).expand(count, 2)
    params = sample_view_params(replace(LACVIT, scale=(0.2, 0.3)), sizes, generator())
    stored = scale_boxes(params.boxes, params.sizes, 64, 64).float()
    original_ratio = (stored[:, 3] * 200) / (stored[:, 2] * 100)
    assert abs(original_ratio.log().mean().item()) < 0.02
    assert original_ratio.min() > 0.7
    assert original_ratio.max() < 1.45


def test_autocast_and_gradients_stay_outside() -> None:
    images, sizes = random_images(4, 32, 32), torch.full((4, 2), 32)
    plain = ViewPipeline(LACVIT)(images, sizes, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ViewPipeline(LACVIT)(images, sizes, generator())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


def test_empty_batch() -> None:
    images, sizes = random_images(0, 32, 32), torch.empty(0, 2, dtype=torch.int64)
    assert ViewPipeline(LACVIT)(images, sizes, generator()).shape == (0, 3, 32, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size_px", [32, 80])
def test_a_gpu_gives_the_views_of_the_cpu(size_px: int) -> None:
    config = replace(EVERYTHING, size_px=size_px)
    images, sizes = random_images(16, 48, 48), torch.full((16, 2), 48)
    on_cpu = ViewPipeline(config).views(images, sizes, generator(), num_views=2)
    on_gpu = ViewPipeline(config).views(images.cuda(), sizes, generator(), num_views=2)
    assert on_gpu.device.type == "cuda"
    assert_near(on_gpu.cpu(), on_cpu, 5e-5)
