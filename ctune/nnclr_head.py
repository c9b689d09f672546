"""The head of MAE-CT: projector, predictor, target projector and queue.

Source: arXiv 2304.10520; ml-jku/MAE-CT, ``models/contrastive_heads/*.py``. Unlike the original
NNCLR (arXiv 2104.14548) no layer before or after a batch norm has a bias.

Several processes: the head is given the whole global batch, the pooled vectors gathered with
gradient (`ctune.methods.contrastive`), and is the same in all of them. Thereby batch norm is over
the global batch on every backend, predictions of all ranks are candidates with their gradient, and
the queues stay replicas; the draws need generators in the same state. `SyncBatchNorm`, which takes
the place of batch norm on GPUs, then normalises by the same mean and variance; the running variance
alone differs, by the factor (N - 1) S / (N S - 1) of the unbiased estimate for S processes.

Letters: B images of the global batch, D dimensions of the encoder, o of the head, Q rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ctune.ema import ema_update, make_average
from ctune.losses.nnclr import nnclr_loss
from ctune.nearest_neighbor_queue import (
    NearestNeighborQueue,
    draw_neighbors,
    find_nearest_neighbors,
    oracle_part,
)
from ctune.unit_length import unit_length

HeadVariant = Literal["nnclr_ema", "nnclr", "no_queue", "oracle"]


@dataclass(frozen=True)
class NNCLRSettings:
    """How a stage trains the head; two stages train one head differently.

    ``variant``: ``nnclr_ema`` looks up the vectors of the target projector, ``nnclr`` those of the
    projector itself; ``no_queue`` takes the other view's vector for the neighbour, with gradient,
    as MAE-CT's code does, and fills the queue for the metrics alone; ``oracle`` is ``nnclr`` with
    rows of the image's own class before all others, for the first part of the batch.
    """

    temperature: float = 0.15
    top_k: int = 1
    variant: HeadVariant = "nnclr_ema"
    oracle_fraction: float = 1.0
    """Share of the batch for which ``oracle`` looks at labels."""
    exclude_self: bool = True
    """Whether older vectors of the same image are no neighbours."""
    transposed: bool = False
    """See `nnclr_loss`."""
    symmetric: bool = True
    """Mean of both directions; else the loss of the first view's predictions alone."""


class PooledBatch(NamedTuple):
    """One view of a global batch, for `NNCLRHead.prefill`."""

    pooled: Tensor
    """[B, D]."""
    ids: Tensor
    """[B] positions of the images in the data set, all different."""
    labels: Tensor | None = None
    """[B] classes, -1 where there is none; None: there are none at all."""


@dataclass(frozen=True)
class NNCLRStep:
    """What the head makes of a batch."""

    loss: Tensor
    """Scalar."""
    z: Tensor
    """[2, B, o]: vectors of unit length that are looked up, without gradient."""
    index: Tensor
    """[2, B]: the row of the queue that each view drew; for ``no_queue`` the nearest."""
    metrics: dict[str, Tensor]
    """``nn_similarity``: mean cosine of the first view with its nearest row. ``nn_agreement``:
    share of images whose two views have the same nearest row. With labels ``nn_accuracy`` and
    ``nn_accuracy_top1``: the share of labelled images whose first view's drawn, or nearest, row has
    the image's class. For ``oracle`` all are of the nearest row without the labels' help."""
    num_labelled: Tensor
    """Scalar: images that the accuracies are of."""


class NNCLRHead(nn.Module):
    """Map pooled vectors [B, D] to [B, o] and learn from their nearest neighbours.

    PyTorch's own initialisation, from its global generator. The target projector starts as a copy.

    Args:
        in_dim: D.
        proj_hidden_dim: width of the projector.
        pred_hidden_dim: width of the predictor.
        out_dim: o.
        queue_size: Q.

    Raises:
        ValueError: a width below 1, an ``out_dim`` or ``queue_size`` below 2.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        proj_hidden_dim: int = 2048,
        pred_hidden_dim: int = 4096,
        out_dim: int = 256,
        queue_size: int = 65536,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_dim", in_dim, 1),
            ("proj_hidden_dim", proj_hidden_dim, 1),
            ("pred_hidden_dim", pred_hidden_dim, 1),
            ("out_dim", out_dim, 2),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.in_dim = in_dim
        self.projector = nn.Sequential(
            *_hidden_layer(in_dim, proj_hidden_dim),
            *_hidden_layer(proj_hidden_dim, proj_hidden_dim),
            nn.Linear(proj_hidden_dim, out_dim, bias=False),
            nn.BatchNorm1d(out_dim),
        )
        self.predictor = nn.Sequential(
            *_hidden_layer(out_dim, pred_hidden_dim),
            nn.Linear(pred_hidden_dim, out_dim, bias=False),
        )
        self.target_projector = make_average(self.projector)
        self.queue = NearestNeighborQueue(queue_size, out_dim)

    def training_loss(
        self,
        pooled: Sequence[Tensor],
        ids: Tensor,
        labels: Tensor | None = None,
        *,
        settings: NNCLRSettings,
        choice: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> NNCLRStep:
        """Return the loss of both views of the global batch, then take the first into the queue.

        Each view goes through the head by itself, so batch norm is over one view; both look into
        the same queue, which has nothing of this batch yet.

        Args:
            pooled: two views, [B, D] each.
            ids: [B] positions of the images in the data set, all different.
            labels: [B] classes, -1 where there is none; None: there are none at all.
            settings: see there.
            choice: for each view which of the k nearest [B] to take; None: drawn.
            generator: source of the draws.

        Raises:
            ValueError: not two views [B, D] with B >= 2; ids not [B], negative or repeated;
                ``oracle`` without labels; as the queue and `find_nearest_neighbors` say.
        """
        self._check(pooled, ids, settings)
        predicted, own = zip(*(self._view(view, settings.variant) for view in pooled), strict=True)
        z = torch.stack([view.detach() for view in own])
        ranked = [self._look_up(view, ids, labels, settings) for view in z]
        given: Sequence[Tensor | None] = [None, None] if choice is None else choice
        drawn = [
            draw_neighbors(rows, choice=chosen, generator=generator)
            for rows, chosen in zip(ranked, given, strict=True)
        ]
        neighbors = own
        if settings.variant != "no_queue":
            neighbors = tuple(self.queue.features[rows] for rows in drawn)
        temperature, transposed = settings.temperature, settings.transposed
        losses = [
            nnclr_loss(p, n, temperature=temperature, transposed=transposed)
            for p, n in zip(predicted, reversed(neighbors), strict=True)
        ]
        loss = (losses[0] + losses[1]) / 2 if settings.symmetric else losses[0]
        told = torch.full_like(ids, -1) if labels is None else labels
        metrics = self._metrics(z, ids, labels, settings, ranked=ranked, chosen=drawn[0])
        self.queue.enqueue(z[0], told, ids)
        return NNCLRStep(loss, z, torch.stack(drawn), metrics, (told >= 0).sum())

    @torch.no_grad()
    def prefill(self, batches: Iterable[PooledBatch]) -> None:
        """Replace the whole queue by the projector's vectors, without which it starts as noise.

        Batch norm is in training mode, as it is for the vectors that follow. Does nothing where the
        queue has vectors of images already, as after a resume.

        Args:
            batches: as many as the queue holds are taken.

        Raises:
            ValueError: too few batches; as `NearestNeighborQueue.enqueue`.
        """
        if bool((self.queue.ids >= 0).any()):
            return
        self.train()
        filled = 0
        for batch in batches:
            z = unit_length(self.projector(batch.pooled))
            told = torch.full_like(batch.ids, -1) if batch.labels is None else batch.labels
            self.queue.enqueue(z, told, batch.ids)
            filled += len(z)
            if filled == len(self.queue):
                return
        raise ValueError(
            f"{filled} images do not fill the queue of {len(self.queue)} rows; give more batches"
        )

    def _view(self, pooled: Tensor, variant: HeadVariant) -> tuple[Tensor, Tensor]:
        """Return prediction and looked-up vector [B, o] of one view, the latter of unit length."""
        projected = self.projector(pooled)
        predicted = self.predictor(projected)
        if variant != "nnclr_ema":
            return predicted, unit_length(projected)
        with torch.no_grad():
            return predicted, unit_length(self.target_projector(pooled))

    def _look_up(
        self, z: Tensor, ids: Tensor, labels: Tensor | None, settings: NNCLRSettings
    ) -> Tensor:
        """Return the nearest rows [B, k] of the queue."""
        oracle_labels = None
        if settings.variant == "oracle":
            if labels is None:
                raise ValueError("the variant 'oracle' looks at labels, but there are none")
            oracle_labels = oracle_part(labels, settings.oracle_fraction)
        return find_nearest_neighbors(
            z,
            ids if settings.exclude_self else None,
            queue=self.queue,
            top_k=settings.top_k,
            oracle_labels=oracle_labels,
        )

    def _metrics(
        self,
        z: Tensor,
        ids: Tensor,
        labels: Tensor | None,
        settings: NNCLRSettings,
        *,
        ranked: Sequence[Tensor],
        chosen: Tensor,
    ) -> dict[str, Tensor]:
        nearest = [rows[:, 0] for rows in ranked]
        if settings.variant == "oracle":
            plain = replace(settings, variant="nnclr", top_k=1)
            nearest = [self._look_up(view, ids, None, plain)[:, 0] for view in z]
            chosen = nearest[0]
        metrics = {
            "nn_similarity": (z[0] * self.queue.features[nearest[0]]).sum(dim=1).mean(),
            "nn_agreement": (nearest[0] == nearest[1]).float().mean(),
        }
        if labels is None:
            return metrics
        labelled = labels >= 0
        count = labelled.sum().clamp(min=1)
        for name, rows in (("nn_accuracy", chosen), ("nn_accuracy_top1", nearest[0])):
            metrics[name] = ((self.queue.labels[rows] == labels) & labelled).sum() / count
        return metrics

    def _check(self, pooled: Sequence[Tensor], ids: Tensor, settings: NNCLRSettings) -> None:
        count = len(ids)
        shapes = [list(view.shape) for view in pooled]
        if count < 2 or shapes != [[count, self.in_dim]] * 2:
            raise ValueError(
                f"pooled has shapes {shapes} for {count} ids; the head takes two views [B, "
                f"{self.in_dim}] of at least 2 images, for batch norm compares them"
            )
        if bool((ids < 0).any()) or len(torch.unique(ids)) < count:
            raise ValueError("ids has negative or repeated numbers; give places in the data set")
        if settings.top_k >= len(self.queue):
            raise ValueError(
                f"top_k is {settings.top_k}, but the queue has {len(self.queue)} rows; it needs "
                "more than top_k"
            )

    @property
    def is_trained(self) -> bool:
        """Whether it has seen a batch; a run that ended early may leave a head as it was made."""
        return bool(self.get_buffer("predictor.1.num_batches_tracked") > 0)

    def restart_target(self) -> None:
        """Make the target projector a copy of the projector, as `contrastive_tuning` starts."""
        self.update_target(0.0)

    def update_target(self, momentum: float) -> None:
        """Average the projector into its target; statistics of batch norm are copied.

        Raises:
            ValueError: momentum outside [0, 1].
        """
        ema_update(
            self.projector.state_dict(), self.target_projector.state_dict(), momentum=momentum
        )

    @torch.no_grad()
    def classify(self, pooled: Tensor) -> Tensor:
        """Return the label [B] of each vector's nearest row of the queue, in eval mode.

        No row is left out: the images are not those of the training. -1: the row has no label.

        Args:
            pooled: [B, D].

        Raises:
            ValueError: the head is in training mode, in which batch norm would mix the rows.
        """
        if self.training:
            raise ValueError("the head is in training mode; call eval() before classify()")
        nearest = find_nearest_neighbors(unit_length(self.projector(pooled)), queue=self.queue)
        return self.queue.labels[nearest[:, 0]]


def _hidden_layer(in_dim: int, out_dim: int) -> list[nn.Module]:
    return [nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), nn.ReLU()]
