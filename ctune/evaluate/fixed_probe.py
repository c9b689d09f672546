"""A probe of one fixed recipe, linear or with hidden layers, as TransFusion's evaluation has it.

Source: arXiv 2403.18681, section 5; HuanranLi/DeepFusion, ``src/LinearProbing.py``.
Letters: C classes, D dimensions, n samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.head_training import (
    HeadBatch,
    Heads,
    Layer,
    cached_source,
    epoch_batches,
    train_heads,
)
from ctune.evaluate.inputs import check_features, check_labels
from ctune.evaluate.probe_protocol import ProbeProtocol


@dataclass(frozen=True)
class FixedProbe:
    """Result of ``fit_linear_probe``."""

    layers: list[Layer]
    """Weight and bias of each layer, ReLU between them."""
    losses: list[float]
    """Mean cross-entropy of each step's batch before the step."""

    @property
    def weight(self) -> Tensor:
        """[C, D] of the last layer."""
        return self.layers[-1][0]

    @property
    def bias(self) -> Tensor:
        """[C] of the last layer."""
        return self.layers[-1][1]

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [n, C] of features [n, D]."""
        x = check_features(features, "test_features").to(self.weight)
        *hidden, last = self.layers
        for weight, bias in hidden:
            x = nn.functional.linear(x, weight, bias).relu()
        return nn.functional.linear(x, *last)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of labels [n] that features [n, D] are classed as."""
        logits = self.logits(features)
        return topk_accuracy(logits, labels.to(logits.device), (1,))[0]


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    protocol: ProbeProtocol,
    shuffle: bool = True,
    hidden_dims: Sequence[int] = (),
    start: Layer | None = None,
) -> FixedProbe:
    """Train one classifier on all samples; the features are taken as they are.

    Args:
        features: [n, D].
        labels: [n] integers in [0, C).
        num_classes: C, at least 2.
        protocol: has one learning rate and no normalisation.
        shuffle: draw every epoch's batches anew; else rows in their order.
        hidden_dims: widths of hidden layers.
        start: weight [C, D] and bias [C]; None: PyTorch's uniform start, from the seed.

    Raises:
        ValueError: shapes, dtypes or labels do not fit; features not finite; labels of a single
            class; another number of rates than one, or a normalisation; a width below 1; a start
            with hidden layers.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a probe needs at least 2")
    if len(protocol.learning_rates) != 1 or protocol.normalization != "none":
        raise ValueError("the protocol must have one learning rate and normalization 'none'")
    x = check_features(features)
    y = check_labels(labels, len(x), num_classes=num_classes).to(x.device)
    if len(torch.unique(y)) < 2:
        raise ValueError(f"labels are all {int(y[0])}; a probe needs samples of two classes")
    layers = _start_layers([x.shape[1], *hidden_dims, num_classes], start, protocol.seed)
    heads = Heads(
        [(weight.to(x), bias.to(x)) for weight, bias in layers],
        protocol.learning_rates,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    losses: list[float] = []
    rows = torch.arange(len(x))
    in_order = [rows.numpy()[i : i + protocol.batch_size] for i in rows[:: protocol.batch_size]]
    cached = cached_source(x, None)

    def source(rows: Tensor, step: int) -> Tensor:
        batch = HeadBatch(cached(rows, step), y[rows])
        losses.append(float(heads.losses(batch)[0]))
        return batch.features

    train_heads(
        heads,
        source,
        labels=y,
        batches=epoch_batches(rows, protocol) if shuffle else lambda epoch: in_order,
        protocol=protocol,
    )
    return FixedProbe(heads.layers(0), losses)


def _start_layers(widths: Sequence[int], start: Layer | None, seed: int) -> list[Layer]:
    layers = _random_layers(widths, seed) if start is None else [start]
    expected = [(outputs, inputs) for inputs, outputs in pairwise(widths)]
    if [tuple(weight.shape) for weight, _ in layers] != expected:
        raise ValueError(f"start must be one layer of weight {[widths[-1], widths[0]]}")
    return layers


def _random_layers(widths: Sequence[int], seed: int) -> list[Layer]:
    """Weights and biases uniform in 1 / sqrt(inputs) about 0, as torch.nn.Linear starts."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        if outputs < 1:
            raise ValueError(f"hidden_dims holds {outputs}; a layer has at least one output")
        bound = 1 / math.sqrt(inputs)
        weight, bias = torch.empty(outputs, inputs), torch.empty(outputs)
        layers.append(
            (
                nn.init.uniform_(weight, -bound, bound, generator=generator),
                nn.init.uniform_(bias, -bound, bound, generator=generator),
            )
        )
    return layers
