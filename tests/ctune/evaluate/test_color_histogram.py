"""Colour histograms and the probe that reads them out of features."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from ctune.evaluate.color_histogram import color_histogram_probe, color_histograms


def images(count: int, seed: int, *, low: int = 0, high: int = 256) -> Tensor:
    """Noise whose brightest level differs between images and channels."""
    generator = torch.Generator().manual_seed(seed)
    most = torch.randint(low + 1, high, (count, 3, 1, 1), generator=generator)
    return (low + torch.rand(count, 3, 8, 8, generator=generator) * (most - low)).byte()


@pytest.mark.parametrize("num_bins", [64, 7])
def test_histograms_are_numpy_s(num_bins: int) -> None:
    pictures = images(40, 0)
    found = color_histograms(pictures, num_bins=num_bins)
    edges = np.ceil(np.arange(num_bins + 1) * 256 / num_bins)
    for image, histogram in zip(pictures, found, strict=True):
        for channel, row in zip(image, histogram, strict=True):
            expected = np.histogram(channel.numpy(), bins=edges)[0] / 64
            np.testing.assert_allclose(row.numpy(), expected)


def test_constant_predictions() -> None:
    """Images of one level each: L1 of the uniform histogram is (1 - 1/64 + 63/64) / 64."""
    pictures = torch.full((6, 3, 4, 4), 100, dtype=torch.uint8)
    histograms = color_histograms(pictures)
    scores = color_histogram_probe(
        torch.randn(6, 5), histograms, torch.randn(6, 5), histograms, seed=0
    )
    assert scores["uniform_l1"] == pytest.approx(2 * 63 / 64 / 64)
    assert scores["mean_l1"] == 0
    assert scores["l1"] == pytest.approx(0, abs=1e-4)


def test_features_that_hold_the_colours_beat_the_constants_and_others_do_not() -> None:
    train, test = color_histograms(images(400, 0)), color_histograms(images(100, 1))
    parts = train.cumsum(2)[:, :, ::8].flatten(1), test.cumsum(2)[:, :, ::8].flatten(1)
    held = color_histogram_probe(parts[0], train, parts[1], test, seed=0)
    blind = color_histogram_probe(torch.randn(400, 3), train, torch.randn(100, 3), test, seed=0)
    assert held["l1"] < 0.9 * held["mean_l1"] < held["uniform_l1"]
    assert blind["l1"] > 0.95 * blind["mean_l1"]
    assert {key: held[key] for key in ("uniform_l1", "mean_l1")} == pytest.approx(
        {key: blind[key] for key in ("uniform_l1", "mean_l1")}
    )
    again = color_histogram_probe(100 * parts[0] + 7, train, 100 * parts[1] + 7, test, seed=0)
    assert again["l1"] == pytest.approx(held["l1"], rel=0.01), "scale and offset are taken out"


@pytest.mark.parametrize(
    ("pictures", "num_bins", "message"),
    [
        (torch.zeros(1, 3, 2, 2), 64, "images is torch.float32 [1, 3, 2, 2]"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 64, "images is torch.uint8 [1, 1, 2, 2]"),
        (images(1, 0), 257, "num_bins is 257"),
    ],
)
def test_refuses_images(pictures: Tensor, num_bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        color_histograms(pictures, num_bins=num_bins)


def test_refuses_what_does_not_fit() -> None:
    histograms = color_histograms(images(4, 0))
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        color_histogram_probe(x[:1], histograms[:1], x, histograms, seed=0)
    with pytest.raises(ValueError, match="histograms have shapes"):
        color_histogram_probe(x, histograms[:3], x, histograms, seed=0)
