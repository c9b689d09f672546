"""Linear probe on cached features: one linear head per learning rate, all trained together.

Source: LaCViT (arXiv 2303.18013), stage 2, as in longkukuhi/LaCViT, ``main_linear.py``: one Linear
on raw features, weight ~ truncated normal std 0.02, bias 0, cross-entropy, SGD with momentum,
cosine per epoch. Deviations: a grid of rates instead of one, E epochs instead of E + 1, the last
epoch's accuracy instead of the best one on the test set.

Letters: G learning rates, C classes, D dimensions, N train and M test samples, n of a batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ctune.errors import DivergedError
from ctune.evaluate.accuracy import topk_accuracy
from ctune.optim import cosine_decay_lr
from ctune.samplers import RandomBatchSampler


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """How heads are trained and one is chosen; the defaults are LaCViT's with a grid around 0.1."""

    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    epochs: int = 100
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_decay_rate: float = 0.2
    standardize: bool = False
    """Centre and scale each dimension by the train set first: MAE's affine-free batch norm."""
    holdout_fraction: float = 0.1
    """Share of each class of the train set that chooses the rate."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value out of range."""
        bounds = {
            "learning_rates": bool(self.learning_rates)
            and all(0 < rate < math.inf for rate in self.learning_rates),
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "lr_decay_rate": 0 <= self.lr_decay_rate <= 1,
            "holdout_fraction": 0 < self.holdout_fraction < 1,
        }
        for name, within in bounds.items():
            if not within:
                raise ValueError(f"{name} is {getattr(self, name)}, which is out of range")


@dataclass(frozen=True, kw_only=True)
class ProbeRate:
    """Outcome of one learning rate; accuracies are fractions, 0 for a head that diverged."""

    lr: float
    holdout_top1: float | None
    """On the held-out part of train, trained on the rest; None for a grid of one rate."""
    top1: float
    """On the test set, trained on the whole train set, last epoch."""
    top5: float
    """Within the 5 largest logits, or all of them with fewer classes."""
    diverged: bool


@dataclass(frozen=True, kw_only=True)
class LinearProbeResult:
    """Outcome of ``linear_probe``; the rate was chosen without looking at the test set."""

    rates: tuple[ProbeRate, ...]
    best: ProbeRate
    weight: Tensor
    """[C, D] of the chosen head, for raw features: any standardisation is folded in."""
    bias: Tensor
    """[C] of the chosen head."""


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    protocol: ProbeProtocol | None = None,
) -> LinearProbeResult:
    """Train one linear head per learning rate on frozen features and test them.

    Choice of the rate: heads are first trained on nine tenths of the train set (a seeded share of
    every class stays out) and the rate with the best top-1 there on the last epoch wins, the
    smaller one among equals. Heads of all rates are then trained again on the whole train set, and
    their last epoch's test accuracies are reported. ``best`` is the chosen rate's, never the best
    on the test set. With a single rate nothing is held out. Deterministic given the seed.

    Args:
        train_features: [N, D] raw encoder features, constant.
        train_labels: [N] integers in [0, C).
        test_features: [M, D].
        test_labels: [M] integers in [0, C).
        num_classes: C, at least 2.
        protocol: None: the defaults.

    Raises:
        ValueError: shapes, dtypes or labels do not fit; features not finite; with a grid, no class
            with enough samples to hold one out.
        DivergedError: the chosen rate's head is not finite.
    """
    settings = protocol or ProbeProtocol()
    _check_split(train_features, train_labels, num_classes, "train")
    _check_split(test_features, test_labels, num_classes, "test")
    if test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test_features has {test_features.shape[1]} dimensions and train_features "
            f"{train_features.shape[1]}; both must come from the same encoder"
        )
    train, test = _at_least_float32(train_features), _at_least_float32(test_features)
    y, test_y = train_labels.long().to(train.device), test_labels.long().to(train.device)
    holdout: list[float | None] = [None] * len(settings.learning_rates)
    if len(settings.learning_rates) > 1:
        kept, held = _split_indices(train_labels, settings)
        kept, held = kept.to(train.device), held.to(train.device)
        heads = _fit_heads(train[kept], y[kept], num_classes, settings)
        holdout = [_accuracies(head, train[held], y[held])[0] for head in heads]
    heads = _fit_heads(train, y, num_classes, settings)
    test = test.to(train.device)
    rates = [
        _tested(lr, held_top1, head, test, test_y)
        for lr, held_top1, head in zip(settings.learning_rates, holdout, heads, strict=True)
    ]
    chosen = max(range(len(rates)), key=lambda i: (rates[i].holdout_top1 or 0.0, -rates[i].lr))
    if rates[chosen].diverged:
        raise DivergedError(
            f"the linear head with learning rate {rates[chosen].lr} is not finite",
            hint="use smaller probe learning rates, or standardise the features",
        )
    weight, bias = heads[chosen]
    return LinearProbeResult(rates=tuple(rates), best=rates[chosen], weight=weight, bias=bias)


def _fit_heads(
    features: Tensor, labels: Tensor, num_classes: int, settings: ProbeProtocol
) -> list[tuple[Tensor, Tensor]]:
    """Train the G heads on features [N, D]; return each one's weight [C, D] and bias [C]."""
    mean, scale = features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    if settings.standardize:
        mean, scale = features.mean(0), (features.var(0, correction=0) + 1e-5).rsqrt()
    x = (features - mean) * scale
    N, D, C, G = len(x), x.shape[1], num_classes, len(settings.learning_rates)
    generator = torch.Generator().manual_seed(settings.seed)
    start = nn.init.trunc_normal_(torch.empty(C, D), std=0.02, generator=generator)
    weight = start.to(x).repeat(G, 1, 1)
    bias = x.new_zeros(G, C)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = x.new_tensor(settings.learning_rates)[:, None]
    sampler = RandomBatchSampler(N, settings.batch_size, seed=settings.seed, drop_last=False)
    for epoch in range(settings.epochs):
        lr = rates * cosine_decay_lr(
            epoch, base_lr=1.0, epochs=settings.epochs, lr_decay_rate=settings.lr_decay_rate
        )
        for batch in sampler.batches(epoch):
            rows = torch.from_numpy(batch).to(x.device)
            weight_gradient, bias_gradient = _gradients(weight, bias, x[rows], labels[rows])
            weight_gradient.add_(weight, alpha=settings.weight_decay)
            bias_gradient.add_(bias, alpha=settings.weight_decay)
            weight_velocity.mul_(settings.momentum).add_(weight_gradient)
            bias_velocity.mul_(settings.momentum).add_(bias_gradient)
            weight.sub_(lr[..., None] * weight_velocity)
            bias.sub_(lr * bias_velocity)
    raw_weight = weight * scale
    raw_bias = bias - raw_weight @ mean
    return list(zip(raw_weight.unbind(), raw_bias.unbind(), strict=True))


def _gradients(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each head's mean cross-entropy: weight [G, C, D], bias [G, C], x [n, D]."""
    G, C, D = weight.shape
    n = len(x)
    logits = torch.addmm(bias.reshape(-1), x, weight.reshape(G * C, D).T).view(n, G, C)
    residual = logits.softmax(2)
    residual[torch.arange(n, device=x.device), :, labels] -= 1
    residual = residual.view(n, G * C) / n
    return (residual.T @ x).view(G, C, D), residual.sum(0).view(G, C)


def _accuracies(head: tuple[Tensor, Tensor], features: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Top-1 and top-5 of one head, 0 if it is not finite."""
    weight, bias = head
    logits = torch.addmm(bias, features, weight.T)
    if not bool(torch.isfinite(logits).all()):
        return (0.0, 0.0)
    return tuple(topk_accuracy(logits, labels, (1, min(5, len(bias)))))


def _tested(
    lr: float, holdout_top1: float | None, head: tuple[Tensor, Tensor], x: Tensor, labels: Tensor
) -> ProbeRate:
    top1, top5 = _accuracies(head, x, labels)
    diverged = not _is_finite(head)
    return ProbeRate(lr=lr, holdout_top1=holdout_top1, top1=top1, top5=top5, diverged=diverged)


def _is_finite(head: tuple[Tensor, Tensor]) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in head)


def _split_indices(labels: Tensor, settings: ProbeProtocol) -> tuple[Tensor, Tensor]:
    """Seeded stratified split: (kept, held-out) indices; at least one of every class of two."""
    rng = np.random.default_rng(settings.seed % 2**64)
    array = labels.cpu().numpy()
    held = []
    for label in np.unique(array):
        members = rng.permutation(np.flatnonzero(array == label))
        share = max(1, round(settings.holdout_fraction * len(members)))
        count = min(len(members) - 1, share)
        held.append(members[:count])
    out = np.zeros(len(array), dtype=bool)
    out[np.concatenate(held)] = True
    if not out.any():
        raise ValueError(
            f"no class of the {len(array)} train samples has two, so none can be held out to "
            "choose the learning rate; give a single learning rate"
        )
    return torch.from_numpy(np.flatnonzero(~out)), torch.from_numpy(np.flatnonzero(out))


def _at_least_float32(features: Tensor) -> Tensor:
    exact = features.detach()
    return exact if exact.dtype == torch.float64 else exact.float()


def _check_split(features: Tensor, labels: Tensor, num_classes: int, name: str) -> None:
    if features.ndim != 2 or 0 in features.shape or not bool(torch.isfinite(features).all()):
        raise ValueError(
            f"{name}_features has shape {list(features.shape)}; it must be finite [N, D], not empty"
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{name}_labels has shape {list(labels.shape)} and dtype {labels.dtype}; it must hold "
            f"{features.shape[0]} integers"
        )
    if num_classes < 2 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"{name}_labels lies in [{int(labels.min())}, {int(labels.max())}] with num_classes "
            f"{num_classes}; labels are 0..num_classes - 1 of at least 2 classes"
        )
