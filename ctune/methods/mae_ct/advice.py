"""Warnings at the start and at the end of a MAE-CT run, with hints (mae_ct.md 7)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ctune.events import Warned
from ctune.methods.base import RunContext
from ctune.schema import JsonObject

COMPARED_IMAGES = 16
SMALLEST_CHANGE = 1e-4
TEMPERATURES = (0.05, 1.0)


def start_warnings(
    *,
    encoder_is_mae: bool,
    queue_size: int,
    num_images: int,
    temperatures: Mapping[str, float],
) -> list[Warned]:
    """Return what encoder, data and config call for before the first step.

    Args:
        encoder_is_mae: whether the encoder is known to be a masked autoencoder's, or becomes one.
        queue_size: rows of the queue.
        num_images: of the training split.
        temperatures: stage to its temperature.
    """
    found = []
    if not encoder_is_mae:
        found.append(
            Warned(
                code="encoder_not_mae",
                message="MAE-CT is meant for the encoder of a masked autoencoder; this one is not"
                " known to be one",
                hint="run the stage mae first, or start from the model of a mae job",
            )
        )
    if queue_size > num_images:
        found.append(
            Warned(
                code="queue_exceeds_dataset",
                message=f"the queue of {queue_size} rows holds images more than once, for there are"
                f" {num_images}: an image leaves out all rows of its own",
                hint="lower head.queue_size to half of the images, or set it to auto",
            )
        )
    low, high = TEMPERATURES
    for stage, temperature in temperatures.items():
        if not low <= temperature <= high:
            found.append(
                Warned(
                    code="unusual_temperature",
                    message=f"{stage}: temperature {temperature} is outside {low} to {high}",
                    hint="0.15 to 0.35 are published",
                )
            )
    return found


def advise(before: JsonObject | None, after: JsonObject) -> list[Warned]:
    """Return what the scores before and after tuning call for."""
    knn = (before or {}).get("knn", {})
    was = knn.get("top1")
    if was is None:
        return []
    found = []
    nearest = knn.get("k1", knn)["top1"]  # the head has one neighbour vote
    head = after.get("nnclr_head", {}).get("knn_top1")
    if head is not None and head <= nearest and head < 1:
        found.append(
            Warned(
                code="head_not_informative",
                message=f"the head's neighbours name the class no more often ({head:.3f}) than the"
                f" untuned encoder's ({nearest:.3f}): tuning towards them does not help",
                hint="train the head longer, with a higher learning rate or a larger batch",
            )
        )
    now = after.get("knn", {}).get("top1")
    if now is not None and now < was:
        found.append(
            Warned(
                code="no_gain",
                message=f"nearest neighbours name the class less often than before tuning:"
                f" {now:.3f}, before {was:.3f}",
                hint="keep the original encoder; else lower base_lr, or train head_init longer",
            )
        )
    return found


class FeatureChange(nn.Module):
    """How far the encoder's vectors of a few images move; its state survives a resume.

    Letters: n images, D dimensions.

    Args:
        num_images: of the training split.
        embed_dim: D.
    """

    start: Tensor

    def __init__(self, num_images: int, embed_dim: int) -> None:
        super().__init__()
        count = min(COMPARED_IMAGES, num_images)
        self._positions = np.linspace(0, num_images - 1, count).round().astype(np.int64)
        self.register_buffer("start", torch.full((count, embed_dim), torch.nan))

    @property
    def noted(self) -> bool:
        """Whether the vectors of the start are known."""
        return not bool(self.start.isnan().any())

    def remember(self, context: RunContext) -> None:
        """Note the vectors of the run's encoder, the first time."""
        if not self.noted:
            self.start.copy_(self._vectors(context))

    def warnings(self, context: RunContext) -> list[Warned]:
        """Return `ema_too_slow` where the encoder gives what it gave at the start."""
        change = (self._vectors(context) - self.start).norm() / self.start.norm()
        if not change < SMALLEST_CHANGE:  # NaN: never remembered, for the stage did not begin
            return []
        return [
            Warned(
                code="ema_too_slow",
                message=f"the averaged encoder's vectors differ from those of the start by"
                f" {float(change):.1e} of their length: it is nearly untuned",
                hint="lower ema_momentum, or tune longer",
            )
        ]

    @torch.no_grad()
    def _vectors(self, context: RunContext) -> Tensor:
        """Return the vectors [n, D] of the images without augmentation; leaves eval mode on."""
        encoder = context.encoder.eval()
        side = (encoder.image_size_px, encoder.image_size_px)
        pixels = context.train_images().batch(self._positions).to(context.device)
        resized = interpolate(pixels.float(), side, mode="bilinear", antialias=True)
        vectors: Tensor = encoder(encoder.preprocessing.normalise(resized.round().byte()))
        return vectors.float()
