"""Each operation against torchvision's, for identical parameters, on float images."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as F

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
from tests.ctune.pictures import MEAN, STD, as_float, assert_near, awkward_images, random_images

OPERATIONS = (
    (adjust_brightness, F.adjust_brightness),
    (adjust_contrast, F.adjust_contrast),
    (adjust_saturation, F.adjust_saturation),
    (adjust_hue, F.adjust_hue),
)


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


def test_grayscale_and_normalise_equal_torchvision() -> None:
    images = awkward_images()
    assert_near(to_grayscale(images), F.rgb_to_grayscale(images, num_output_channels=3))
    assert_near(normalise(images, MEAN, STD), F.normalize(images, list(MEAN), list(STD)))


@pytest.mark.parametrize("threshold", [0.0, 100 / 255, 128 / 255, 1.0])
def test_solarise_equals_torchvision(threshold: float) -> None:
    images = awkward_images()
    actual = solarise(images, torch.full((len(images),), threshold))
    assert torch.equal(actual, F.solarize(images, threshold))


def test_each_image_is_solarised_at_its_own_threshold() -> None:
    images, thresholds = as_float(random_images(5, 7, 9)), torch.linspace(0, 1, 5)
    untouched = images.clone()
    pairs = zip(images, thresholds.tolist(), strict=True)
    assert torch.equal(
        solarise(images, thresholds), torch.stack([F.solarize(i, t) for i, t in pairs])
    )
    assert torch.equal(images, untouched)


@pytest.mark.parametrize(
    ("height", "width", "radius"), [(9, 9, 8), (17, 33, 4), (32, 32, 8), (75, 40, 11), (5, 64, 1)]
)
def test_blur_equals_torchvision_with_one_sigma_per_image(
    height: int, width: int, radius: int
) -> None:
    images, sigmas = as_float(random_images(6, height, width)), torch.linspace(0.1, 2.0, 6)
    untouched = images.clone()
    kernel = [2 * radius + 1] * 2
    pairs = zip(images, sigmas.tolist(), strict=True)
    expected = torch.stack([F.gaussian_blur(i, kernel, [s, s]) for i, s in pairs])
    assert_near(gaussian_blur(images, sigmas, radius_px=radius), expected)
    assert torch.equal(images, untouched)


def test_some_rows_change_and_the_others_stay() -> None:
    images = as_float(random_images(5, 4, 4))
    before = images.clone()
    rows, factors = torch.tensor([1, 4]), torch.tensor([0.5, 0.25])
    after = apply_to_rows(images, rows, adjust_brightness, factors)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert_near(after[[1, 4]], before[[1, 4]] * factors[:, None, None, None])


def test_erased_boxes_are_standard_normal_and_depend_on_the_seed_alone() -> None:
    boxes = torch.tensor([[3, 4, 50, 40], [0, 0, 0, 0], [10, 0, 30, 64]])
    seeds = torch.tensor([7, 8, 9])
    erased = erase(torch.zeros(3, 3, 64, 64), boxes, seeds)
    assert not erased[1].any()
    for row, (top, left, height, width) in ((0, boxes[0].tolist()), (2, boxes[2].tolist())):
        noise = erased[row, :, top : top + height, left : left + width]
        assert abs(noise.mean().item()) < 0.05
        assert abs(noise.std().item() - 1) < 0.05
        assert erased[row].count_nonzero() == noise.numel()
    alone = erase(torch.zeros(1, 3, 64, 64), boxes[2:], seeds[2:])
    assert torch.equal(alone[0], erased[2])
