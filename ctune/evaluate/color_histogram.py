"""How well a linear layer reads the colours of an image out of its features: MAE-CT's diagnostic.

Encoders that were trained by contrast alone may take colour statistics for a shortcut: then they
predict them far better than a constant does. Source: arXiv 2304.10520; ml-jku/MAE-CT,
``losses/functional/color_histogram_losses.py``, ``eval_colorhist_random_performance.py``.
Deviations: images are those of the evaluation, in training too, so that features are computed once;
the recipe of the probe is ours.

Letters: N training and M test images, n of a batch, S side, D dimensions, K bins.
"""

from typing import TypedDict

import torch
from torch import Tensor

from ctune.evaluate.inputs import check_features, check_same_dimensions
from ctune.optim import make_optimizer
from ctune.samplers import RandomBatchSampler
from ctune.schedules import WarmupCosine

NUM_BINS = 64
EPOCHS, BATCH_SIZE, LEARNING_RATE = 100, 256, 3e-3
_IMAGES_AT_ONCE = 32


class ColorHistogramScores(TypedDict):
    """Mean absolute errors per bin on the test images, lower is closer."""

    l1: float
    """Of the probe."""
    uniform_l1: float
    """Of the constant that MAE-CT compares with, 1 / K in every bin; 0.0120 on ImageNet val."""
    mean_l1: float
    """Of the mean histogram of the training images."""


def color_histograms(images: Tensor, *, num_bins: int = NUM_BINS) -> Tensor:
    """Return the share of each channel's pixels per bin of equal width, [n, 3, K] float32.

    Args:
        images: uint8 [n, 3, S, S].
        num_bins: K, in [1, 256].

    Raises:
        ValueError: images not uint8 [n, 3, S, S], not empty; num_bins out of range.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images is {images.dtype} {list(images.shape)}; need uint8 [n, 3, S, S]")
    if not 1 <= num_bins <= 256:
        raise ValueError(f"num_bins is {num_bins}; it must be in [1, 256]")
    parts = []
    for part in torch.split(images.flatten(2), _IMAGES_AT_ONCE):
        rows = torch.arange(part.shape[0] * 3, device=part.device).view(-1, 3, 1)
        cells = part.long() * num_bins // 256 + rows * num_bins
        counts = torch.bincount(cells.flatten(), minlength=rows.numel() * num_bins)
        parts.append(counts.view(-1, 3, num_bins).float() / part.shape[2])
    return torch.cat(parts)


def color_histogram_probe(
    train_features: Tensor,
    train_histograms: Tensor,
    test_features: Tensor,
    test_histograms: Tensor,
    *,
    seed: int,
) -> ColorHistogramScores:
    """Train a linear layer with a softmax per channel to give histograms, under their L1 distance.

    Features are centred and scaled by the training images. Adam, 100 epochs, batch 256, learning
    rate 0.003 with a cosine to 0. The layer starts as the mean histogram.

    Args:
        train_features: [N, D].
        train_histograms: [N, 3, K], as `color_histograms` gives them.
        test_features: [M, D].
        test_histograms: [M, 3, K].
        seed: of the batches.

    Raises:
        ValueError: features not finite [N, D] and [M, D] with N >= 2; other histograms.
    """
    x = check_features(train_features, "train_features", min_rows=2).float()
    test = check_features(test_features, "test_features").to(x)
    check_same_dimensions(x, test)
    wanted, asked = train_histograms.to(x), test_histograms.to(x)
    if [len(wanted), len(asked)] != [len(x), len(test)] or wanted.shape[1:] != asked.shape[1:]:
        shapes = list(wanted.shape), list(asked.shape)
        raise ValueError(f"histograms have shapes {shapes} for {len(x)} and {len(test)} images")
    center, scale = x.mean(0), x.std(0) + 1e-5
    x, test = (x - center) / scale, (test - center) / scale
    mean = wanted.mean(0)
    layer = _train_layer(x, wanted, mean, seed=seed)
    return {
        "l1": _distance(_predict(layer, test, mean.shape), asked),
        "uniform_l1": _distance(torch.full_like(mean, 1 / mean.shape[1]), asked),
        "mean_l1": _distance(mean, asked),
    }


def _train_layer(x: Tensor, wanted: Tensor, mean: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return weight [3 K, D] and bias [3 K]."""
    weight = x.new_zeros(mean.numel(), x.shape[1]).requires_grad_()
    bias = (mean + 1e-6).log().flatten().clone().requires_grad_()  # of empty bins too
    optimizer = make_optimizer("adam", [weight, bias], lr=LEARNING_RATE)
    sampler = RandomBatchSampler(len(x), min(BATCH_SIZE, len(x)), seed=seed)
    schedule = WarmupCosine(EPOCHS * len(sampler), peak=LEARNING_RATE)
    step = 0
    for epoch in range(EPOCHS):
        for batch in sampler.batches(epoch):
            rows = torch.from_numpy(batch).to(x.device)
            optimizer.param_groups[0]["lr"] = schedule(step)
            predicted = _predict((weight, bias), x[rows], mean.shape)
            loss = (predicted - wanted[rows]).abs().mean()
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return weight.detach(), bias.detach()


def _predict(layer: tuple[Tensor, Tensor], features: Tensor, shape: torch.Size) -> Tensor:
    """Return histograms [n, 3, K]."""
    return torch.nn.functional.linear(features, *layer).view(-1, *shape).softmax(2)


def _distance(predicted: Tensor, wanted: Tensor) -> float:
    return float((predicted - wanted).abs().double().mean())
