"""Each operation against torchvision's, for identical parameters, on float images.

Tolerances: 1e-5 absolute for all operations; the resize of single images on the CPU is torch's own.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ctune.augment import (
    ViewConfig,
    ViewParams,
    ViewPipeline,
    colour_jitter,
    sample_view_params,
    scale_boxes,
)
from ctune.pixel_ops import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    hflip,
    normalise,
    resized_crop,
    to_grayscale,
)

TOLERANCE = 1e-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LACVIT = ViewConfig(
    size_px=32,
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_prob=0.8,
    grayscale_prob=0.2,
    mean=MEAN,
    std=STD,
)
OPERATIONS = (
    (adjust_brightness, F.adjust_brightness),
    (adjust_contrast, F.adjust_contrast),
    (adjust_saturation, F.adjust_saturation),
    (adjust_hue, F.adjust_hue),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator(seed)
    )


def as_float(images: Tensor) -> Tensor:
    converted: Tensor = F.to_dtype(images, torch.float32, scale=True)
    return converted


def awkward_images() -> Tensor:
    """Noise, all corners of the colour cube, all greys, nearly grey, dark, and ties of channels."""
    noise = as_float(random_images(4, 16, 16))
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3))).T.reshape(3, 27)
    cube = corners.repeat(1, 10)[:, :256].reshape(1, 3, 16, 16)
    grey = (torch.arange(256) / 255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    nearly_grey = (grey + torch.rand(1, 3, 16, 16, generator=generator()) * 1e-6).clamp(0, 1)
    dark = noise[:1] * 1e-3
    return torch.cat((noise, cube, grey, nearly_grey, dark, torch.zeros_like(dark)))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# --- single operations ---


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.999, 1.0, 1.4, 3.0])
@pytest.mark.parametrize(("ours", "theirs"), OPERATIONS[:3])
def test_blends_equal_torchvision(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[..., Tensor], factor: float
) -> None:
    images = awkward_images()
    actual = ours(images, torch.full((len(images),), factor))
    assert_near(actual, theirs(images, factor))


@pytest.mark.parametrize("shift", [-0.5, -0.37, -1 / 6, -0.1, 0.0, 1e-3, 0.1, 1 / 3, 0.5])
def test_hue_equals_torchvision(shift: float) -> None:
    images = awkward_images()
    assert_near(adjust_hue(images, torch.full((len(images),), shift)), F.adjust_hue(images, shift))


@given(rgb=st.tuples(*[st.integers(0, 255)] * 3), shift=st.floats(-0.5, 0.5, width=32))
@settings(max_examples=300, deadline=None)
def test_hue_of_any_colour(rgb: tuple[int, int, int], shift: float) -> None:
    image = torch.tensor(rgb).view(1, 3, 1, 1) / 255
    assert_near(adjust_hue(image, torch.tensor([shift])), F.adjust_hue(image, shift))


@pytest.mark.parametrize(("ours", "theirs"), OPERATIONS)
def test_each_image_has_its_own_factor(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[..., Tensor]
) -> None:
    images = awkward_images()
    untouched = images.clone()
    factors = torch.linspace(0, 0.5, len(images))
    expected = [theirs(i, float(f)) for i, f in zip(images, factors, strict=True)]
    assert_near(ours(images, factors), torch.stack(expected))
    assert torch.equal(images, untouched)


def test_grayscale_flip_and_normalise_equal_torchvision() -> None:
    images = awkward_images()
    assert_near(to_grayscale(images), F.rgb_to_grayscale(images, num_output_channels=3))
    assert torch.equal(hflip(images), F.horizontal_flip(images))
    assert_near(normalise(images, MEAN, STD), F.normalize(images, list(MEAN), list(STD)))


# --- resized crop ---

CROPS = [(0, 0, 40, 56), (3, 7, 1, 1), (39, 55, 1, 1), (0, 0, 1, 56), (5, 0, 35, 1), (5, 5, 20, 11)]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size_px", [1, 8, 32, 63, 64, 96])
def test_resized_crop_equals_torchvision(size_px: int, flipped: bool) -> None:
    images = random_images(len(CROPS), 40, 56)
    actual = resized_crop(
        images, torch.tensor(CROPS), size_px, flip=torch.full((len(CROPS),), flipped)
    )
    size = [size_px, size_px]
    expected = torch.stack(
        [
            F.resized_crop(image, *box, size, antialias=True)
            for image, box in zip(as_float(images), CROPS, strict=True)
        ]
    )
    assert_near(actual, hflip(expected) if flipped else expected)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_resized_crop_of_any_box(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
    size_px = data.draw(st.sampled_from([4, 17, 32, 64]))
    image = random_images(1, height, width)
    expected = F.resized_crop(as_float(image), *box, [size_px, size_px], antialias=True)
    assert_near(resized_crop(image, torch.tensor([box]), size_px), expected)


def test_resized_crop_takes_float_images() -> None:
    images, boxes = random_images(2, 20, 20), torch.tensor([[2, 3, 10, 12], [0, 0, 20, 20]])
    assert_near(resized_crop(as_float(images), boxes, 16), resized_crop(images, boxes, 16))


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


# --- sampling ---


def test_same_seed_same_parameters_and_other_seed_others() -> None:
    sizes = torch.full((64, 2), 32)
    first, again = (sample_view_params(LACVIT, sizes, generator(3)) for _ in range(2))
    other = sample_view_params(LACVIT, sizes, generator(4))
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.boxes, other.boxes)
    assert not torch.equal(first.factors, other.factors)


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


# --- whole views ---


def torchvision_view(image: Tensor, params: ViewParams, row: int, config: ViewConfig) -> Tensor:
    """The same view by torchvision's functions, one image at a time."""
    size = [config.size_px, config.size_px]
    view = F.resized_crop(as_float(image), *params.boxes[row].tolist(), size, antialias=True)
    if params.flip[row]:
        view = F.horizontal_flip(view)
    if params.jitter[row]:
        for index in params.order[row].tolist():
            view = OPERATIONS[index][1](view, float(params.factors[row, index]))
    if params.grayscale[row]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
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
    config = replace(LACVIT, size_px=size_px)
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
    config = replace(LACVIT, size_px=size_px)
    images, sizes = random_images(16, 48, 48), torch.full((16, 2), 48)
    on_cpu = ViewPipeline(config).views(images, sizes, generator(), num_views=2)
    on_gpu = ViewPipeline(config).views(images.cuda(), sizes, generator(), num_views=2)
    assert on_gpu.device.type == "cuda"
    assert_near(on_gpu.cpu(), on_cpu, 5e-5)
