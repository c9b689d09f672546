"""RandAugment against timm's: the operations on 8-bit images, and the rule of the strengths.

Operations are compared on values of whole grey levels, within half a level where both only round,
geometric ones where no colour comes in from outside.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ctune.randaugment import (
    OPERATIONS,
    RandAugment,
    apply_operations,
    draw_operations,
)
from tests.ctune.pictures import as_float, assert_near, generator, random_images

NAMES = list(OPERATIONS)
FILL = (0.5, 0.4, 0.3)
TIMM_NAMES = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterise": "PosterizeIncreasing",
    "solarise": "SolarizeIncreasing",
    "solarise_add": "SolarizeAdd",
    "saturation": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def applied(images: Tensor, name: str, arguments: list[float]) -> Tensor:
    """One operation on every image, each with its own argument."""
    drawn = torch.full((len(images), 1), NAMES.index(name))
    return apply_operations(images.clone(), drawn, torch.tensor(arguments)[:, None], fill=FILL)


def smooth_images(count: int, side: int) -> Tensor:
    """8-bit images in which neighbours are alike, as in photographs."""
    small = random_images(count, 6, 6)
    large: Tensor = F.resize(small, [side, side], InterpolationMode.BICUBIC)
    return large


def sheared(image: Tensor, shear: list[float]) -> Any:
    degrees = [math.degrees(math.atan(factor)) for factor in shear]
    return F.affine(image, 0.0, [0, 0], 1.0, degrees, InterpolationMode.BILINEAR, center=[0.0, 0.0])


def moved(image: Tensor, across: float, down: float) -> Any:
    side = image.shape[-1]
    offset = [-round(across * side), -round(down * side)]
    return F.affine(image, 0.0, offset, 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)


TORCHVISION: dict[str, tuple[Callable[..., Any], list[float]]] = {
    "autocontrast": (lambda image, _: F.autocontrast(image), [0.0, 0.0, 0.0]),
    "equalize": (lambda image, _: F.equalize(image), [0.0, 0.0, 0.0]),
    "invert": (lambda image, _: F.invert(image), [0.0, 0.0, 0.0]),
    "posterise": (lambda image, bits: F.posterize(image, int(bits)), [0.0, 2.0, 4.0]),
    "solarise": (lambda image, at: F.solarize(image, min(at, 255)), [26.0, 128.0, 200.0]),
}
BLENDS: dict[str, Callable[..., Any]] = {
    "saturation": F.adjust_saturation,
    "contrast": F.adjust_contrast,
    "brightness": F.adjust_brightness,
    "sharpness": F.adjust_sharpness,
}
GEOMETRIC: dict[str, tuple[Callable[..., Any], list[float]]] = {
    "rotate": (lambda x, angle: F.rotate(x, angle, InterpolationMode.BILINEAR), [-30.0, 8.0, 27.0]),
    "shear_x": (lambda image, by: sheared(image, [by, 0.0]), [-0.3, 0.1, 0.28]),
    "shear_y": (lambda image, by: sheared(image, [0.0, by]), [-0.3, 0.1, 0.28]),
    "translate_x": (lambda image, by: moved(image, by, 0), [-0.25, 0.125, 0.375]),
    "translate_y": (lambda image, by: moved(image, 0, by), [-0.25, 0.125, 0.375]),
}


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("side", [17, 40])
def test_operations_equal_torchvision_on_8_bit_images(name: str, side: int) -> None:
    """Within a grey level: torchvision cuts fractions off."""
    theirs, arguments = TORCHVISION[name]
    images = random_images(3, side, side)
    expected = torch.stack([theirs(i, a) for i, a in zip(images, arguments, strict=True)])
    assert_near(applied(as_float(images), name, arguments), as_float(expected), 1.001 / 255)


@pytest.mark.parametrize("name", BLENDS)
def test_blends_equal_torchvision(name: str) -> None:
    images, factors = as_float(random_images(3, 17, 40)), [0.1, 1.4, 1.9]
    expected = [BLENDS[name](image, f) for image, f in zip(images, factors, strict=True)]
    assert_near(applied(images, name, factors), torch.stack(expected))


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_equal_torchvision_inside(name: str) -> None:
    theirs, arguments = GEOMETRIC[name]
    images = as_float(random_images(3, 32, 32))
    actual = applied(images, name, arguments)
    for view, image, argument in zip(actual, images, arguments, strict=True):
        share = theirs(torch.ones_like(image), argument)
        assert_near(view[share > 1 - 1e-5], theirs(image, argument)[share > 1 - 1e-5])
        outside = (share == 0).all(0)
        assert outside.any()
        assert_near(view[:, outside], torch.tensor(FILL)[:, None].expand(3, int(outside.sum())))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("negative", [False, True])
def test_operations_equal_timms(name: str, negative: bool) -> None:
    """Strength and operation at once: timm's on PIL images at a fixed magnitude.

    Compared in the middle, where geometric operations bring nothing in from outside, and on smooth
    images, because timm's interpolation rounds.
    """
    magnitude, images = 3.0, smooth_images(2, 48)
    hparams = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BILINEAR}
    theirs = auto_augment.AugmentOp(  # type: ignore[no-untyped-call]
        TIMM_NAMES[name], prob=1.0, magnitude=magnitude, hparams=hparams
    )
    sign = 1.0 if negative else 0.0  # timm negates a draw above 0.5, and so do we
    random.seed(next(n for n in range(99) if (random.Random(n).random() > 0.5) == negative))
    state = random.getstate()
    expected = []
    for image in images:
        random.setstate(state)
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected.append(torch.from_numpy(np.array(theirs(pil))).permute(2, 0, 1))
    which = (NAMES.index(name) + 0.5) / len(NAMES)
    uniform = torch.tensor([[which, 0.0, sign]]).expand(2, 3)
    config = RandAugment(magnitude=magnitude, num_layers=1, prob=1.0)
    normal = torch.zeros(2, 1, dtype=torch.float64)
    drawn = draw_operations(config, uniform=uniform.double(), normal=normal)
    actual = apply_operations(as_float(images), *drawn, fill=FILL)
    middle = slice(16, 32)
    difference = (actual - as_float(torch.stack(expected)))[:, :, middle, middle].abs() * 255
    assert difference.mean() < 0.75
    assert difference.quantile(0.99) <= 2.0


def test_draws_have_timms_distribution() -> None:
    count = 30_000
    uniform = torch.rand(count, 6, generator=generator(), dtype=torch.float64)
    normal = torch.randn(count, 2, generator=generator(1), dtype=torch.float64)
    operations, arguments = draw_operations(RandAugment(), uniform=uniform, normal=normal)
    assert operations.shape == arguments.shape == (count, 2)
    assert abs((operations < 0).float().mean().item() - 0.5) < 0.01
    shares = torch.bincount(operations[operations >= 0].flatten()) / (operations >= 0).sum()
    assert_near(shares, torch.full((len(NAMES),), 1 / len(NAMES)), 0.01)
    degrees = arguments[operations == NAMES.index("rotate")]
    assert abs((degrees > 0).float().mean().item() - 0.5) < 0.05
    assert abs(degrees.abs().mean().item() - 27) < 0.2  # magnitude 9 of 10, of 30 degrees
    assert degrees.abs().max() <= 30  # magnitudes beyond 10 are cut
    bits = arguments[operations == NAMES.index("posterise")]
    assert set(bits.tolist()) <= {0.0, 1.0, 2.0}


def test_layers_follow_each_other_and_rows_are_independent() -> None:
    images = as_float(random_images(3, 16, 16))
    invert, brightness = NAMES.index("invert"), NAMES.index("brightness")
    drawn = torch.tensor([[invert, brightness], [-1, -1], [brightness, invert]])
    arguments = torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.5, 0.0]])
    actual = apply_operations(images.clone(), drawn, arguments, fill=FILL)
    assert_near(actual[0], (1 - images[0]) * 0.5)
    assert torch.equal(actual[1], images[1])
    assert_near(actual[2], 1 - images[2] * 0.5)
