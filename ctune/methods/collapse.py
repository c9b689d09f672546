"""Watches the vectors of a contrastive loss for collapse, with a named warning and a hint.

The tests are those of lacvit.md 7 and transformer_head.md 7; they fit every loss that pulls some
vectors together and pushes others apart. A loss that only passes its uniform value on the way down
is no collapse, so it must stay there for a while.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ctune.events import Warned

COLLAPSE_STEPS = 50
CHECK_STEPS = 10
"""A check waits for the device, so that it is done now and then only."""


@dataclass(frozen=True)
class UniformLoss:
    """When a loss counts as that of vectors which are all alike."""

    share: float = 0.0
    """Within this share of the uniform value below it, or above it."""
    margin: float = 0.0
    """Or within this difference."""
    above: bool = True
    """Also however far above it; else no further above than below."""
    from_step: float = 0.0
    steps: int = COLLAPSE_STEPS
    """One after the other, all after `from_step`."""


class CollapseWatch(nn.Module):
    """Watches the vectors under the loss; its state is in buffers, so that it survives a resume.

    Args:
        uniform: when the loss is too high.
        steps_per_epoch: optimizer steps.
        batches_per_step: batches that are observed in an optimizer step.
        warmup_epochs: in which the learning rate rises from 0.
        hint: what to do against a collapse.
        metric: name for the spread of the vectors.
    """

    low_std_batches: Tensor
    uniform_batches: Tensor
    positives: Tensor
    anchors: Tensor
    initial_norm: Tensor
    told: Tensor

    def __init__(
        self,
        *,
        uniform: UniformLoss,
        steps_per_epoch: int,
        warmup_epochs: int,
        hint: str,
        batches_per_step: int = 1,
        metric: str = "z_std",
    ) -> None:
        super().__init__()
        self._uniform = uniform
        self._steps_per_epoch = steps_per_epoch
        self._batches_per_step = batches_per_step
        # The first step of a warm-up has a rate of 0: with one step per epoch it is all of epoch 1.
        self._first_moving_epoch = 2 if warmup_epochs and steps_per_epoch == 1 else 1
        self._hint = hint
        self._metric = metric
        self._remembered = False
        self.register_buffer("low_std_batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("uniform_batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("positives", torch.zeros((), dtype=torch.float64))
        self.register_buffer("anchors", torch.zeros((), dtype=torch.float64))
        self.register_buffer("initial_norm", torch.full((), math.nan, dtype=torch.float64))
        self.register_buffer("told", torch.zeros((), dtype=torch.bool))

    def remember(self, trained: nn.Module) -> None:
        """Note the size of what is trained before its first update."""
        if not self._remembered and bool(self.initial_norm.isnan()):
            self.initial_norm.copy_(squared_norm(trained))
        self._remembered = True

    def observe(
        self, z: Tensor, labels: Tensor | None, *, loss: Tensor, uniform_loss: float
    ) -> dict[str, Tensor]:
        """Take in one batch and return its metrics.

        Args:
            z: [B, V, d] detached; only their directions count.
            labels: [B] where the loss uses them.
            loss: of the batch, detached.
            uniform_loss: what the loss is when all vectors are alike.
        """
        dim = z.shape[2]
        std = normalize(z.reshape(-1, dim).float(), dim=1).std(dim=0).mean()
        self.low_std_batches.copy_(
            torch.where(std < 0.1 / math.sqrt(dim), self.low_std_batches + 1, 0)
        )
        lowest = uniform_loss * (1 - self._uniform.share) - self._uniform.margin
        highest = math.inf if self._uniform.above else 2 * uniform_loss - lowest
        near = (loss >= lowest) & (loss <= highest)
        self.uniform_batches.copy_(torch.where(near, self.uniform_batches + 1, 0))
        metrics = {self._metric: std}
        if labels is not None:
            same_class = (labels[:, None] == labels).sum(dim=1)  # no `unique`: it waits for the GPU
            share = (same_class > 1).float().mean()
            self.positives += share
            self.anchors += 1
            metrics["positive_share"] = share
        return metrics

    def warnings(self, step: int, trained: nn.Module) -> list[Warned]:
        """Return what the state after optimizer step `step` (from 0) calls for."""
        found = []
        epoch, into_epoch = divmod(step + 1, self._steps_per_epoch)
        due = (step + 1) % CHECK_STEPS == 0 or into_epoch == 0
        if due and not bool(self.told) and self._collapsed(step):
            self.told.fill_(True)
            found.append(
                Warned(
                    code="collapse",
                    message=f"step {step}: the vectors hardly differ from each other"
                    if self._for_steps(self.low_std_batches, COLLAPSE_STEPS)
                    else f"step {step}: the loss is no lower than that of vectors which are"
                    " all alike",
                    hint=self._hint,
                )
            )
        if into_epoch == 0:
            found += self._epoch_warnings(epoch, trained)
            self.positives.zero_()
            self.anchors.zero_()
        return found

    def _collapsed(self, step: int) -> bool:
        late = step + 1 >= self._uniform.from_step + self._uniform.steps
        uniform = late and self._for_steps(self.uniform_batches, self._uniform.steps)
        return uniform or self._for_steps(self.low_std_batches, COLLAPSE_STEPS)

    def _for_steps(self, batches: Tensor, steps: int) -> bool:
        return int(batches) >= steps * self._batches_per_step

    def _epoch_warnings(self, epoch: int, trained: nn.Module) -> list[Warned]:
        found = []
        if epoch == 1 and float(self.anchors):
            share = float(self.positives / self.anchors)
            if share < 0.5:
                found.append(
                    Warned(
                        code="few_positives",
                        message=f"only {share:.0%} of the anchors met another image of their class",
                        hint="set contrastive.batch_sampler to class_balanced",
                    )
                )
        unmoved = epoch <= 2 and float(squared_norm(trained)) == float(self.initial_norm)
        if epoch == self._first_moving_epoch and unmoved:
            found.append(
                Warned(
                    code="no_update",
                    message=f"nothing was learned up to epoch {epoch}: no weight changed",
                    hint="check the learning rate and its schedule",
                )
            )
        return found


def squared_norm(module: nn.Module) -> Tensor:
    """Return the squared norm of all parameters in float64: changes whenever one of them does."""
    return torch.stack([p.detach().double().square().sum() for p in module.parameters()]).sum()
