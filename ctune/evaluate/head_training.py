"""Classifier heads on frozen features, one per learning rate, that share every batch.

One matrix product serves the first layers of all heads. Logits lie as [H, C, n]: a softmax over a
short last dimension takes over ten times as long on a CPU. Biases are columns of the weights, for a
last feature that is 1. Gradients are written out: at these sizes autograd costs more than they do.

Letters: H heads, C classes, D dimensions, n rows of a batch, O outputs of a layer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ctune.evaluate.probe_protocol import ProbeProtocol
from ctune.optim import LARS
from ctune.samplers import Indices, RandomBatchSampler

Layer = tuple[Tensor, Tensor]
"""Weight [O, D] and bias [O]."""
Source = Callable[[Tensor, int], Tensor]
"""(rows [n] of the train set, step) -> features [n, D + 1], the last column 1."""


class HeadBatch(NamedTuple):
    """Rows that all heads see at once."""

    features: Tensor
    """[n, D + 1], the last column 1."""
    labels: Tensor
    """[n] int64."""
    row_weights: Tensor | None = None
    """[H, n] weight of a row in a head's loss; None: 1 / n each."""


class Heads:
    """H heads of the same layers from the same start, ReLU between layers, trained by SGD.

    As torch.optim.SGD: v = momentum v + g + weight_decay p, p = p - lr v, with g the gradient of
    the cross-entropy, biases included.

    Args:
        start: the layers; every head starts as a copy.
        learning_rates: [H].
        momentum: in [0, 1).
        weight_decay: at least 0.
    """

    def __init__(
        self,
        start: Sequence[Layer],
        learning_rates: Sequence[float],
        *,
        momentum: float,
        weight_decay: float,
    ) -> None:
        H = len(learning_rates)
        self._weights = [
            torch.cat([weight, bias[:, None]], 1).repeat(H, 1, 1) for weight, bias in start
        ]
        self._velocities = [torch.zeros_like(weight) for weight in self._weights]
        self._rates = start[0][0].new_tensor(learning_rates).view(H, 1, 1)
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._one_hot = torch.eye(len(start[-1][1])).to(start[-1][0])

    def __len__(self) -> int:
        return len(self._rates)

    def step(self, batch: HeadBatch, factor: float) -> None:
        """Do one step of SGD with each head's learning rate times `factor`."""
        inputs, scores = self._forward(batch.features)
        # The learning rate goes into the error [H, C, n], the smallest tensor of the step.
        scale = self._rates / len(batch.labels)
        if batch.row_weights is not None:
            scale = self._rates * batch.row_weights[:, None]
        error = scores.softmax(1).sub_(self._one_hot[:, batch.labels]).mul_(scale)
        for i in reversed(range(len(self._weights))):
            weight, velocity, momentum = self._weights[i], self._velocities[i], self._momentum
            if i == 0:
                velocity.flatten(0, 1).addmm_(error.flatten(0, 1), batch.features, beta=momentum)
            else:
                velocity.baddbmm_(error, inputs[i].transpose(1, 2), beta=momentum)
                error = weight[:, :, :-1].transpose(1, 2) @ error
                error.mul_(inputs[i][:, :-1] > 0)
            if self._weight_decay:
                velocity.addcmul_(weight, self._rates, value=self._weight_decay)
            weight.sub_(velocity, alpha=factor)

    def losses(self, batch: HeadBatch) -> Tensor:
        """Mean cross-entropy [H] of each head."""
        scores = self._forward(batch.features)[1]
        own = scores[:, batch.labels, torch.arange(len(batch.labels), device=scores.device)]
        return (scores.logsumexp(1) - own).mean(1)

    def layers(self, head: int) -> list[Layer]:
        """Return copies of the layers of one head."""
        return [(w[head, :, :-1].clone(), w[head, :, -1].clone()) for w in self._weights]

    def _forward(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what each layer reads, [H, O + 1, n] but for the first, and scores [H, C, n]."""
        first, *others = self._weights
        scores = (first.flatten(0, 1) @ features.T).view(*first.shape[:2], len(features))
        inputs = [features]
        for weight in others:
            hidden = torch.cat([scores.relu(), torch.ones_like(scores[:, :1])], 1)
            inputs.append(hidden)
            scores = weight @ hidden
        return inputs, scores


class LarsHeads:
    """H linear heads from the same start, each trained by `ctune.optim.LARS` by itself.

    Weight [O, D] and bias [O] are tensors of their own: a step of the weight is scaled by its norm.
    Arguments as `Heads`, of which this has the methods that training needs.
    """

    def __init__(
        self,
        start: Layer,
        learning_rates: Sequence[float],
        *,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self._heads = [
            (nn.Parameter(start[0].clone()), nn.Parameter(start[1].clone())) for _ in learning_rates
        ]
        self._rates = learning_rates
        groups = [{"params": [*head], "weight_decay": weight_decay} for head in self._heads]
        self._optimizer = LARS(groups, learning_rates[0], momentum=momentum)

    def __len__(self) -> int:
        return len(self._heads)

    @torch.enable_grad()
    def step(self, batch: HeadBatch, factor: float) -> None:
        """Do one step of LARS with each head's learning rate times `factor`."""
        count = len(batch.labels)
        scores = torch.stack([linear(batch.features[:, :-1], *head) for head in self._heads])
        targets = batch.labels.expand(len(self), -1)
        losses = cross_entropy(scores.transpose(1, 2), targets, reduction="none")
        weights = batch.row_weights
        loss = losses.sum() / count if weights is None else (losses * weights).sum()
        torch.autograd.backward(loss)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad()

    def layers(self, head: int) -> list[Layer]:
        """Return copies of the only layer of one head."""
        weight, bias = self._heads[head]
        return [(weight.detach().clone(), bias.detach().clone())]


def train_heads(
    heads: Heads | LarsHeads,
    source: Source,
    *,
    labels: Tensor,
    batches: Callable[[int], Sequence[Indices]],
    protocol: ProbeProtocol,
    held: Tensor | None = None,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train all heads on the same batches, as `protocol` says.

    Args:
        heads: changed in place.
        source: gives the features of some rows.
        labels: [N] of all rows.
        batches: epoch, from 0, to its batches of rows; every epoch has as many.
        protocol: epochs and schedule.
        held: [N] rows that the second half of the heads does without.
        after_epoch: told when an epoch is over.
    """
    factor_at = protocol.factor_at(len(batches(0)))
    step = 0
    with torch.no_grad():
        for epoch in range(protocol.epochs):
            drawn = batches(epoch)
            order = torch.from_numpy(np.concatenate(drawn)).to(labels.device)
            for rows in torch.split(order, [len(batch) for batch in drawn]):
                weights = None if held is None else _row_weights(held[rows], len(heads))
                batch = HeadBatch(source(rows, step), labels[rows], weights)
                heads.step(batch, factor_at(step))
                step += 1
            after_epoch()


def epoch_batches(rows: Tensor, protocol: ProbeProtocol) -> Callable[[int], list[Indices]]:
    """Return epoch -> shuffled batches of some rows [R]."""
    count, array = len(rows), rows.cpu().numpy()
    drop_last = protocol.drop_last and count >= protocol.batch_size
    sampler = RandomBatchSampler(
        count, protocol.batch_size, seed=protocol.seed, drop_last=drop_last
    )
    return lambda epoch: [array[batch] for batch in sampler.batches(epoch)]


def cached_source(features: Tensor, norm: nn.BatchNorm1d | None) -> Source:
    """Return what gives rows of features [N, D], normalised by `norm`."""
    if norm is not None and norm.training:
        return lambda rows, step: with_ones(norm(features.index_select(0, rows)))
    fixed = with_ones(features if norm is None else norm(features))
    return lambda rows, step: fixed.index_select(0, rows)


def with_ones(features: Tensor) -> Tensor:
    """Return features [n, D] with a last column of ones, [n, D + 1]."""
    return nn.functional.pad(features, (0, 1), value=1.0)


def _row_weights(held: Tensor, num_heads: int) -> Tensor:
    """Weights [H, n] of the rows of a batch: all rows alike, or the rows that are not held out."""
    kept = (~held).double()
    every = torch.full_like(kept, 1 / len(kept))
    half = num_heads // 2
    parts = [every.expand(half, -1), (kept / kept.sum().clamp(min=1)).expand(half, -1)]
    return torch.cat(parts).float()
