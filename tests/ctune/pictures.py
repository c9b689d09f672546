"""Images for tests of pixel operations, and how near results must be."""

import itertools

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ctune.augment import ViewConfig
from ctune.randaugment import RandAugment

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
EVERYTHING = ViewConfig(
    size_px=32,
    vflip_prob=0.3,
    rotation_prob=0.4,
    rotation_degrees=30.0,
    rand_augment=RandAugment(),
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_prob=0.8,
    grayscale_prob=0.2,
    blur_prob=0.5,
    solarise_prob=0.1,
    erase_prob=0.25,
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
