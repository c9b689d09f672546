"""Crops and affine maps against torchvision's, for identical parameters, on float images.

Tolerance 1e-5 absolute; the resize of single images on the CPU is torch's own.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ctune.geometry_ops import (
    Interpolation,
    affine,
    hflip,
    resized_crop,
    rotate,
    rotation_matrix,
    translate,
    vflip,
)
from tests.ctune.pictures import as_float, assert_near, random_images

CROPS = [(0, 0, 40, 56), (3, 7, 1, 1), (39, 55, 1, 1), (0, 0, 1, 56), (5, 0, 35, 1), (5, 5, 20, 11)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size_px", [1, 8, 32, 63, 64, 96])
def test_resized_crop_equals_torchvision(
    size_px: int, flipped: bool, interpolation: Interpolation
) -> None:
    images = random_images(len(CROPS), 40, 56)
    flip = torch.full((len(CROPS),), flipped)
    boxes = torch.tensor(CROPS)
    actual = resized_crop(images, boxes, size_px, flip=flip, interpolation=interpolation)
    size = [size_px, size_px]
    expected = torch.stack(
        [
            F.resized_crop(image, *box, size, InterpolationMode(interpolation), antialias=True)
            for image, box in zip(as_float(images), CROPS, strict=True)
        ]
    ).clamp(0, 1)
    assert_near(actual, hflip(expected) if flipped else expected)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_resized_crop_of_any_box(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
    size_px = data.draw(st.sampled_from([4, 17, 32, 64]))
    image = random_images(1, height, width)
    for kind in ("bilinear", "bicubic"):
        actual = resized_crop(image, torch.tensor([box]), size_px, interpolation=kind)
        size, mode = [size_px, size_px], InterpolationMode(kind)
        expected = F.resized_crop(as_float(image), *box, size, mode, antialias=True)
        assert_near(actual, expected.clamp(0, 1))


def test_resized_crop_takes_float_images() -> None:
    images, boxes = random_images(2, 20, 20), torch.tensor([[2, 3, 10, 12], [0, 0, 20, 20]])
    assert_near(resized_crop(as_float(images), boxes, 16), resized_crop(images, boxes, 16))


def test_flips_equal_torchvision() -> None:
    images = random_images(3, 5, 8)
    assert torch.equal(hflip(images), F.horizontal_flip(images))
    assert torch.equal(vflip(images), F.vertical_flip(images))


def test_whole_pixels_are_moved_exactly() -> None:
    images, shift = as_float(random_images(4, 33, 20)), [[0, 0], [3, -4], [-7, 2], [40, 0]]
    for view, image, (down, right) in zip(
        translate(images, torch.tensor(shift)), images, shift, strict=True
    ):
        assert torch.equal(view, F.affine(image, 0.0, [right, down], 1.0, [0.0, 0.0]))
    assert not translate(images, torch.tensor(shift))[3].any()


@pytest.mark.parametrize("side", [1, 2, 7, 32, 65])
def test_a_turn_by_90_degrees_is_exact_and_counter_clockwise(side: int) -> None:
    images = as_float(random_images(2, side, side))
    turned = rotate(images, torch.tensor([90.0, -90.0]))
    assert torch.equal(turned[0], torch.rot90(images[0], 1, (1, 2)))
    assert torch.equal(turned[0], F.rotate(images[0], 90))
    assert torch.equal(turned[1], torch.rot90(images[1], -1, (1, 2)))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 33), (40, 25)])
def test_rotation_equals_torchvision_with_one_angle_per_image(height: int, width: int) -> None:
    """But for places half-way between pixels, which rounding gives to either."""
    images, degrees = as_float(random_images(7, height, width)), torch.linspace(-173, 140, 7)
    untouched = images.clone()
    pairs = zip(images, degrees.tolist(), strict=True)
    expected = torch.stack([F.rotate(image, angle, fill=0) for image, angle in pairs])
    other = (rotate(images, degrees) - expected).abs() > 1e-5
    assert other.float().mean() < 0.001
    assert torch.equal(images, untouched)


def test_bilinear_affine_equals_torchvision_where_nothing_is_filled() -> None:
    images = as_float(random_images(3, 31, 24))
    degrees = torch.tensor([-20.0, 5.0, 33.0])
    actual = affine(
        images, rotation_matrix(degrees), interpolation="bilinear", fill=(0.1, 0.2, 0.3)
    )
    for view, image, angle in zip(actual, images, degrees.tolist(), strict=True):
        kwargs = {"interpolation": InterpolationMode.BILINEAR, "fill": [0.1, 0.2, 0.3]}
        expected = F.rotate(image, angle, **kwargs)
        whole = F.rotate(torch.ones_like(image), angle, interpolation=InterpolationMode.BILINEAR)
        inside, outside = whole > 1 - 1e-6, whole == 0
        assert_near(view[inside], expected[inside])
        assert_near(view[outside], expected[outside])
        assert outside.any()
