"""Watches the gradient norms of a stage for one that leaps up: bad data, or too high a rate.

Every step's norm is taken in on the device; values come to the host only where the loop logs.
"""

import bisect
import statistics

import torch
from torch import Tensor

from ctune.events import Warned
from ctune.schema import Schema

SPIKE = 100.0
"""Times the median: mae.md 7."""
FEWEST_NORMS = 20
"""So many must be known before one can be called a leap."""


class GradientState(Schema):
    """What a resumed run must remember of the gradients of the present stage."""

    stage: str = ""
    norms: list[float] = []
    """Those that were logged, in rising order."""
    peak: float = 0.0
    """The largest since the last log."""
    told: bool = False


class GradientWatch:
    """Compares the largest gradient norm since the last log with the median of those logged."""

    def __init__(self) -> None:
        self._known = GradientState()
        self._peak: Tensor | None = None

    @property
    def state(self) -> GradientState:
        """What a checkpoint must hold; a GPU is waited for."""
        peak = self._known.peak if self._peak is None else float(self._peak)
        return self._known.model_copy(update={"peak": peak})

    def resume(self, state: GradientState) -> None:
        """Go on from what a checkpoint held."""
        self._known, self._peak = state, None

    def note(self, norm: Tensor) -> None:
        """Take in the norm of one step, a scalar on any device."""
        if self._peak is None:
            self._peak = torch.full_like(norm, self._known.peak)
        self._peak = torch.maximum(self._peak, norm.nan_to_num())  # checkpoints hold finite values

    def warnings(self, stage: str, step: int, norm: float) -> list[Warned]:
        """Return what the steps since the last log call for: `gradient_spike`, once per stage.

        Args:
            stage: another than last time begins anew.
            step: the one that is logged.
            norm: its gradient norm.
        """
        known, peak = self._known, self.state.peak
        if known.stage != stage:
            known = GradientState(stage=stage)
        median = statistics.median(known.norms) if len(known.norms) >= FEWEST_NORMS else 0.0
        leaps = not known.told and 0 < SPIKE * median < peak
        norms = [*known.norms]
        bisect.insort(norms, norm)
        self.resume(GradientState(stage=stage, norms=norms, told=known.told or leaps))
        return [_spike(stage, step, peak=peak, median=median)] if leaps else []


def _spike(stage: str, step: int, *, peak: float, median: float) -> Warned:
    return Warned(
        code="gradient_spike",
        message=f"{stage}, up to step {step}: a gradient norm of {peak:.3g}; half of those before"
        f" were below {median:.3g}",
        hint="lower the learning rate, lengthen the warm-up, set clip_grad_norm where the method"
        " has it, or look for images that do not belong",
    )
