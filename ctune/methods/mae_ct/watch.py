"""Watches over the neighbours of NNCLR and over collapse, with named warnings (mae_ct.md 7).

Letters: B images of the global batch, Q rows of the queue.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctune.events import Warned
from ctune.methods.collapse import CollapseWatch, UniformLoss
from ctune.nnclr_head import NNCLRStep

CHECK_STEPS = 10
"""A check waits for the device, so that it is done now and then only."""
FEWEST_DRAWN = 0.01
LARGEST_SHARE = 0.05
TIMES_EVEN = 10
"""Of a queue of 24 rows each has 4 % of the draws: a hub has ten times as many too."""
HUB_WINDOWS = 3
"""One after the other. In Q draws of two views half of the queue is replaced: the first two windows
may draw from its noise."""
DRIFT_IMAGES = 4096
"""Images over which an accuracy is taken: 0.5 is then known to 0.008."""
DRIFT_WINDOWS = 2
DRIFTED_SHARE = 0.8
STANDARD_ERRORS = 3
AVERAGED = ("nn_accuracy", "nn_accuracy_top1", "nn_similarity", "nn_agreement")
HUB_HINTS: Mapping[str, str] = {
    "head_init": "raise queue_size, or lower head_base_lr",
    "contrastive_tuning": "raise top_k or queue_size",
}


class NeighborWatch(nn.Module):
    """Watches which rows of the queue are drawn, and in `contrastive_tuning` how good they are.

    `hubness`: over Q draws fewer than 1 % of the rows are drawn, or one row is more than 5 % of the
    draws, three times in a row. `neighbour_drift`: the accuracy of the drawn rows is over 20 %
    below its best; both are means over 4096 images, each taken three standard errors to the careful
    side, and the fall must last two of them.

    All processes observe the global batch, so that they agree. The state is in buffers.

    Args:
        queue_size: Q.
        stage: `contrastive_tuning`, in which the accuracy is watched, or another.
        log_steps: optimizer steps over which the metrics are means.
    """

    draws: Tensor
    drawn_share: Tensor
    largest_share: Tensor
    hub_windows: Tensor
    hits: Tensor
    images: Tensor
    best_accuracy: Tensor
    accuracy: Tensor
    drift_windows: Tensor
    log_sums: Tensor
    log_weights: Tensor
    told: Tensor

    def __init__(self, queue_size: int, stage: str, *, log_steps: int = 1) -> None:
        super().__init__()
        self._stage = stage
        self._log_steps = log_steps
        self._batch_size = 0
        self.register_buffer("draws", torch.zeros(queue_size, dtype=torch.int64))
        for name in ("drawn_share", "largest_share", "accuracy"):
            self.register_buffer(name, torch.full((), math.nan, dtype=torch.float64))
        for name in ("hits", "images", "best_accuracy"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in ("hub_windows", "drift_windows"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        for name in ("log_sums", "log_weights"):
            self.register_buffer(name, torch.zeros(len(AVERAGED), dtype=torch.float64))
        self.register_buffer("told", torch.zeros(2, dtype=torch.bool))

    @torch.no_grad()
    def observe(self, step: NNCLRStep) -> dict[str, Tensor]:
        """Take in one step and return its metrics.

        Returns:
            the head's metrics, averaged since the last log, and `drawn_share`: the share of the
            queue's rows that was drawn in the last Q draws, NaN before there were as many.
        """
        index = step.index.flatten()
        self._batch_size = step.index.shape[1]
        self.draws.index_add_(0, index, torch.ones_like(index))
        if "nn_accuracy" in step.metrics:
            self.hits += step.metrics["nn_accuracy"] * step.num_labelled
            self.images += step.num_labelled
        for place, name in enumerate(AVERAGED):
            if name in step.metrics:
                weight = step.num_labelled if "accuracy" in name else self._batch_size
                self.log_sums[place] += step.metrics[name] * weight
                self.log_weights[place] += weight
        means = (self.log_sums / self.log_weights).float()
        averaged = dict(zip(AVERAGED, means.unbind(), strict=True))
        present = {name: averaged[name] for name in step.metrics}
        return present | {"drawn_share": self.drawn_share.float()}

    @torch.no_grad()
    def warnings(self, step: int) -> list[Warned]:
        """Return what the state after optimizer step `step` (from 0) calls for."""
        if (step + 1) % math.ceil(len(self.draws) / (2 * self._batch_size)) == 0:
            self._end_draws()
        if (step + 1) % math.ceil(DRIFT_IMAGES / self._batch_size) == 0:
            self._end_accuracy()
        if step % self._log_steps == 0:  # those of this step have been handed out
            self.log_sums.zero_()
            self.log_weights.zero_()
        if (step + 1) % CHECK_STEPS:
            return []
        due = [self.hub_windows >= HUB_WINDOWS, self.drift_windows >= DRIFT_WINDOWS]
        new = torch.stack(due) & ~self.told
        hub, drift = new.tolist()
        self.told |= new
        return ([self._hubness(step)] if hub else []) + ([self._drift(step)] if drift else [])

    def _end_draws(self) -> None:
        count = self.draws.sum()
        self.drawn_share.copy_((self.draws > 0).sum() / len(self.draws))
        self.largest_share.copy_(self.draws.max() / count)
        most = max(LARGEST_SHARE, TIMES_EVEN / len(self.draws))
        hub = (self.drawn_share < FEWEST_DRAWN) | (self.largest_share > most)
        self.hub_windows.copy_(torch.where(hub, self.hub_windows + 1, 0))
        self.draws.zero_()

    def _end_accuracy(self) -> None:
        """Compare the window's accuracy with the best; without labels all is NaN, and false."""
        if self._stage != "contrastive_tuning":
            return
        accuracy = self.hits / self.images
        error = STANDARD_ERRORS * (accuracy * (1 - accuracy) / self.images).sqrt()
        fallen = accuracy + error < DRIFTED_SHARE * self.best_accuracy
        self.drift_windows.copy_(torch.where(fallen, self.drift_windows + 1, 0))
        self.best_accuracy.copy_(torch.fmax(self.best_accuracy, accuracy - error))
        self.accuracy.copy_(accuracy)
        self.hits.zero_()
        self.images.zero_()

    def _hubness(self, step: int) -> Warned:
        return Warned(
            code="hubness",
            message=f"step {step}: images share few neighbours: {float(self.drawn_share):.1%} of"
            f" the queue's rows are drawn, one of them {float(self.largest_share):.1%} of the time",
            hint=HUB_HINTS.get(self._stage, "raise queue_size"),
        )

    def _drift(self, step: int) -> Warned:
        return Warned(
            code="neighbour_drift",
            message=f"step {step}: fewer neighbours are of the image's class than before:"
            f" {float(self.accuracy):.1%}, at best {float(self.best_accuracy):.1%} or more",
            hint="lower base_lr, or raise target_momentum",
        )


def make_collapse_watch(*, warmup_steps: int, steps_per_epoch: int) -> CollapseWatch:
    """Return the watch for vectors that are all alike: they hardly spread, or the loss is ln N.

    To be given the vectors that are looked up [B, 2, o] and the loss of that value (mae_ct.md 7).
    A new head, whose queue is noise, has a higher loss: that is no collapse.
    """
    return CollapseWatch(
        uniform=UniformLoss(share=0.01, above=False, from_step=warmup_steps),
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=0,
        hint="lower head_base_lr, or raise the batch size",
    )
