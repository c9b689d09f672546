"""Linear probe of a frozen encoder: one linear head per learning rate, all trained together.

Two protocols. ``cached``: the heads train on features that were computed once. ``full``: they train
on features of random crops, one encoding for all heads. Three recipes of training:

- MAE-CT (arXiv 2304.10520), ``mae_ct_protocol``. Deviation: the rate is chosen on a held-out part
  of the train set; its published numbers are the best over all rates and epochs on the test set.
- LaCViT (arXiv 2303.18013), stage 2, longkukuhi/LaCViT ``main_linear.py``: the defaults of
  ``ProbeProtocol``. Deviations: a grid of rates instead of one, E epochs instead of E + 1, the last
  epoch's accuracy instead of the best one on the test set.
- MAE (arXiv 2111.06377), ``mae_protocol``. Deviation: batch norm tests with the mean statistics of
  all steps, not with a moving average.

Letters: G learning rates, C classes, D dimensions, N train and M test samples, n of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ctune.errors import DivergedError
from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.head_training import (
    Heads,
    LarsHeads,
    Layer,
    cached_source,
    epoch_batches,
    train_heads,
    with_ones,
)
from ctune.evaluate.inputs import check_features, check_labels, check_same_dimensions
from ctune.evaluate.probe_protocol import ProbeProtocol

BATCH_NORM_EPS = 1e-5
Augmented = Callable[[Tensor, int], Tensor]
"""(rows [n] of the train set, step) -> features [n, D] of random crops of these images."""


class LinearProbeHead(nn.Module):
    """The head of MAE-CT's published probes: batch norm without affine parameters, then linear.

    Weight truncated normal of std 0.01, bias 0. forward: features [n, D] -> logits [n, C].
    """

    def __init__(
        self, dim: int, num_classes: int, *, eps: float = BATCH_NORM_EPS, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=eps, momentum=momentum, affine=False)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [n, C]."""
        logits: Tensor = self.linear(self.norm(features))
        return logits


@dataclass(frozen=True, kw_only=True)
class ProbeRate:
    """Outcome of one learning rate of the grid."""

    lr: float
    holdout_top1: float | None
    """On the held-out part of train, trained on the rest; 0 for a head that diverged, None for a
    grid of one rate."""
    diverged: bool


@dataclass(frozen=True, kw_only=True)
class LinearProbeResult:
    """Outcome of ``linear_probe``; accuracies are fractions of the test set, last epoch."""

    protocol: Literal["cached", "full"]
    """Accuracies of the two do not compare."""
    lr: float
    """The rate that was chosen, without a look at the test set."""
    top1: float
    top5: float
    """Within the 5 largest logits, or all of them with fewer classes."""
    top1_max_on_test: float | None
    """The best of all rates and epochs, chosen on the test set itself: too high by nature, only for
    comparison with numbers that were published so. ``full``, or asked for by the recipe."""
    rates: tuple[ProbeRate, ...]
    weight: Tensor
    """[C, D] of the chosen head, for raw features: any normalisation is folded in."""
    bias: Tensor
    """[C] of the chosen head."""

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [n, C] of raw features [n, D]."""
        return _logits((self.weight, self.bias), features.to(self.weight))


class _Split(NamedTuple):
    features: Tensor
    labels: Tensor


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    protocol: ProbeProtocol | None = None,
    augmented: Augmented | None = None,
) -> LinearProbeResult:
    """Train one linear head per learning rate on frozen features and test the chosen one.

    Choice of the rate: heads are trained without a seeded tenth of every class, and the rate with
    the best top-1 there on the last epoch wins, the smaller one among equals. The head that is
    tested was trained with this rate on the whole train set. With a single rate nothing is held
    out. Deterministic given the seed.

    Args:
        train_features: [N, D] raw encoder features, constant.
        train_labels: [N] integers in [0, C).
        test_features: [M, D].
        test_labels: [M] integers in [0, C).
        num_classes: C, at least 2.
        protocol: None: the defaults.
        augmented: makes the protocol ``full``: heads train on what it gives, and train_features
            only serve to choose the rate.

    Raises:
        ValueError: shapes, dtypes or labels do not fit; features not finite; with a grid, no class
            with enough samples to hold one out; ``standardize`` with `augmented`.
        DivergedError: the chosen rate's head is not finite.
    """
    settings = protocol or ProbeProtocol()
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a probe needs at least 2")
    train = _checked_split(train_features, train_labels, num_classes, "train")
    test = _checked_split(test_features, test_labels, num_classes, "test")
    check_same_dimensions(train.features, test.features)
    test = _Split(test.features.to(train.features), test.labels.to(train.labels))
    if augmented is None:
        return _probe_cached(train, test, num_classes, settings)
    return _probe_augmented(train, test, num_classes, settings, augmented=augmented)


def _probe_cached(
    train: _Split, test: _Split, num_classes: int, settings: ProbeProtocol
) -> LinearProbeResult:
    """Choose the rate with heads of all rates, then train one head with it on all samples."""

    best = _BestOnTest(test)

    def fit(rates: Sequence[float], rows: Tensor, *, watch: bool = False) -> list[Layer]:
        norm = _make_norm(train.features[rows], settings)
        heads = _make_heads(train.features, num_classes, rates, settings)
        train_heads(
            heads,
            cached_source(train.features, norm),
            labels=train.labels,
            batches=epoch_batches(rows, settings),
            protocol=settings,
            after_epoch=lambda: best.look(_folded(heads, norm)) if watch else None,
        )
        return _folded(heads, norm)

    rates = settings.learning_rates
    everything = torch.arange(len(train.labels), device=train.labels.device)
    if len(rates) == 1:
        outcomes = [ProbeRate(lr=rates[0], holdout_top1=None, diverged=False)]
    else:
        held = _held_out(train.labels, settings)
        candidates = fit(rates, everything[~held])
        outcomes = _rated(rates, candidates, _Split(train.features[held], train.labels[held]))
    chosen = _choose(outcomes)
    if not settings.tests_all_rates:
        (head,) = fit([rates[chosen]], everything)
        return _tested(head, outcomes, chosen, test, protocol="cached")
    head = fit(rates, everything, watch=True)[chosen]
    return _tested(head, outcomes, chosen, test, protocol="cached", max_on_test=best.top1)


def _probe_augmented(
    train: _Split,
    test: _Split,
    num_classes: int,
    settings: ProbeProtocol,
    *,
    augmented: Augmented,
) -> LinearProbeResult:
    """Train heads for the choice and heads for the test on the same crops, encoded once."""
    if settings.normalization == "standardize":
        raise ValueError("normalization 'standardize' needs the features of all crops beforehand")
    rates = settings.learning_rates
    G = len(rates)
    held = _held_out(train.labels, settings) if G > 1 else None
    norm = _make_norm(train.features, settings)
    heads = _make_heads(train.features, num_classes, rates * (1 if held is None else 2), settings)
    best = _BestOnTest(test)

    def source(rows: Tensor, step: int) -> Tensor:
        features = augmented(rows, step).to(train.features)
        return with_ones(features if norm is None else norm(features))

    train_heads(
        heads,
        source,
        labels=train.labels,
        batches=epoch_batches(torch.arange(len(train.labels)), settings),
        protocol=settings,
        held=held,
        after_epoch=lambda: best.look(_folded(heads, norm)[:G]),
    )
    folded = _folded(heads, norm)
    outcomes = [ProbeRate(lr=lr, holdout_top1=None, diverged=False) for lr in rates]
    if held is not None:
        outcomes = _rated(rates, folded[G:], _Split(train.features[held], train.labels[held]))
    chosen = _choose(outcomes)
    return _tested(folded[chosen], outcomes, chosen, test, protocol="full", max_on_test=best.top1)


class _BestOnTest:
    """The best top-1 of any head after any epoch."""

    def __init__(self, test: _Split) -> None:
        self.top1 = 0.0
        self._test = test

    def look(self, heads: Sequence[Layer]) -> None:
        self.top1 = max(self.top1, *(_accuracies(head, self._test)[0] for head in heads))


def _make_norm(features: Tensor, settings: ProbeProtocol) -> nn.BatchNorm1d | None:
    """Return the normalisation, in eval mode where it is fixed by the train features [N, D]."""
    if settings.normalization == "none":
        return None
    # momentum None: running statistics are the mean of all steps, right after few steps as well.
    norm = nn.BatchNorm1d(features.shape[1], eps=settings.norm_eps, momentum=None, affine=False)
    norm = norm.to(features)
    if settings.normalization == "batch_norm":
        return norm.train()
    norm.running_mean = features.mean(0)
    norm.running_var = features.var(0, correction=0)
    return norm.eval()


def _make_heads(
    features: Tensor, num_classes: int, rates: Sequence[float], settings: ProbeProtocol
) -> Heads | LarsHeads:
    generator = torch.Generator().manual_seed(settings.seed)
    start = torch.empty(num_classes, features.shape[1])
    if settings.init_std > 0:
        nn.init.trunc_normal_(start, std=settings.init_std, generator=generator)
    else:
        start.zero_()
    layer = start.to(features), features.new_zeros(num_classes)
    momentum, decay = settings.momentum, settings.weight_decay
    if settings.optimizer == "lars":
        return LarsHeads(layer, rates, momentum=momentum, weight_decay=decay)
    return Heads([layer], rates, momentum=momentum, weight_decay=decay)


def _folded(heads: Heads | LarsHeads, norm: nn.BatchNorm1d | None) -> list[Layer]:
    """Weight [C, D] and bias [C] of every head, for raw features."""
    layers = [heads.layers(i)[0] for i in range(len(heads))]
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return layers
    mean, scale = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    return [(weight * scale, bias - (weight * scale) @ mean) for weight, bias in layers]


def _rated(rates: Sequence[float], heads: Sequence[Layer], held: _Split) -> list[ProbeRate]:
    return [
        ProbeRate(lr=lr, holdout_top1=_accuracies(head, held)[0], diverged=not _is_finite(head))
        for lr, head in zip(rates, heads, strict=True)
    ]


def _choose(outcomes: Sequence[ProbeRate]) -> int:
    """Index of the best rate, the smallest among equals."""
    key = [(rate.holdout_top1 or 0.0, not rate.diverged, -rate.lr) for rate in outcomes]
    return max(range(len(outcomes)), key=key.__getitem__)


def _tested(
    head: Layer,
    outcomes: Sequence[ProbeRate],
    chosen: int,
    test: _Split,
    *,
    protocol: Literal["cached", "full"],
    max_on_test: float | None = None,
) -> LinearProbeResult:
    lr = outcomes[chosen].lr
    if not _is_finite(head):
        raise DivergedError(
            f"the linear head with learning rate {lr} is not finite",
            hint="use smaller probe learning rates, or standardise the features",
        )
    top1, top5 = _accuracies(head, test)
    return LinearProbeResult(
        protocol=protocol,
        lr=lr,
        top1=top1,
        top5=top5,
        top1_max_on_test=max_on_test,
        rates=tuple(outcomes),
        weight=head[0],
        bias=head[1],
    )


def _accuracies(head: Layer, split: _Split) -> tuple[float, float]:
    """Top-1 and top-5 of one head, 0 if it is not finite."""
    logits = _logits(head, split.features)
    if not bool(torch.isfinite(logits).all()):
        return (0.0, 0.0)
    top1, top5 = topk_accuracy(logits, split.labels, (1, min(5, logits.shape[1])))
    return top1, top5


def _logits(head: Layer, features: Tensor) -> Tensor:
    return torch.addmm(head[1], features, head[0].T)


def _is_finite(head: Layer) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in head)


def _held_out(labels: Tensor, settings: ProbeProtocol) -> Tensor:
    """Seeded stratified choice of rows, bool [N]: at least one of every class of two."""
    rng = np.random.default_rng(settings.seed % 2**64)
    array = labels.cpu().numpy()
    out = np.zeros(len(array), dtype=bool)
    for label in np.unique(array):
        members = rng.permutation(np.flatnonzero(array == label))
        share = max(1, round(settings.holdout_fraction * len(members)))
        out[members[: min(len(members) - 1, share)]] = True
    if not out.any():
        raise ValueError(
            f"no class of the {len(array)} train samples has two, so none can be held out to "
            "choose the learning rate; give a single learning rate"
        )
    return torch.from_numpy(out).to(labels.device)


def _checked_split(features: Tensor, labels: Tensor, num_classes: int, name: str) -> _Split:
    x = check_features(features, f"{name}_features")
    y = check_labels(labels, len(x), f"{name}_labels", num_classes=num_classes)
    return _Split(x, y.to(x.device))
