"""Schedules as pure functions of the time. Never imports torch.

They serve for learning rate, weight decay, momentum and temperature alike. The time t is counted in
optimizer steps or in epochs, fractions allowed; a schedule is a value, so nothing of it is saved.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Ramp = Literal["start", "peak", "both", "neither"]

_RAMP_OFFSETS: Mapping[Ramp, tuple[int, int]] = {
    "start": (0, 0),
    "peak": (1, 0),
    "both": (0, -1),
    "neither": (1, 1),
}


@dataclass(frozen=True)
class WarmupCosine:
    """A linear warm-up of length W, then half a cosine until T.

    t < W: start + (peak - start) (t + a) / (W + b); else, with s = t - W and S = T - W:
    end + (peak - end) (1 + cos(pi s / S)) / 2. W = 0 leaves out the warm-up. With W = T and
    peak = end it is a ramp to a constant. `ramp` says which of its two values the steps 0 ... W - 1
    of the warm-up have themselves:

    - ``start``: a = b = 0; peak comes at t = W (facebookresearch/mae, ``util/lr_sched.py``);
    - ``peak``: a = 1, b = 0, the last warm-up step has it (open_clip, ``scheduler.py``);
    - ``both``: a = 0, b = -1, numpy's linspace; ``start`` for W = 1 (facebookresearch/dino,
      ``utils.py: cosine_scheduler``);
    - ``neither``: a = b = 1, no step is wasted on 0 (ml-jku/MAE-CT).

    Raises:
        ValueError: T not positive; W outside [0, T]; a value below 0 or not finite; an unknown
            ramp; hold < 1.
    """

    total: float
    """T."""
    peak: float
    end: float = 0.0
    """May be above `peak`, as for a momentum that rises to 1."""
    warmup: float = 0.0
    """W."""
    start: float = 0.0
    ramp: Ramp = "start"
    reach_end: bool = False
    """S - 1 in place of S, so that step T - 1 has `end`."""
    hold: int = 1
    """After the warm-up the value changes only when t reaches a multiple of this (an epoch)."""

    def __post_init__(self) -> None:
        if not 0 < self.total < math.inf:
            raise ValueError(f"total is {self.total}; it must be a positive number")
        if not 0 <= self.warmup <= self.total:
            raise ValueError(f"warmup is {self.warmup}; it must be in [0, total = {self.total}]")
        for name in ("peak", "end", "start"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a number of at least 0")
        if self.ramp not in _RAMP_OFFSETS:
            raise ValueError(f"ramp is {self.ramp!r}; use one of {', '.join(_RAMP_OFFSETS)}")
        if self.hold < 1:
            raise ValueError(f"hold is {self.hold}; it must be at least 1")

    def __call__(self, time: float) -> float:
        """Return the value at `time`.

        Raises:
            ValueError: time outside [0, T], with `reach_end` outside [0, T - 1].
        """
        last = self.total - 1 if self.reach_end else self.total
        if not 0 <= time <= last:
            raise ValueError(f"the time is {time}; it must be in [0, {last}]")
        if time < self.warmup:
            shift, more = _RAMP_OFFSETS[self.ramp]
            length = self.warmup + more
            share = (time + shift) / length if length > 0 else 0.0
            return self.start + (self.peak - self.start) * share
        if self.hold > 1:
            time = time // self.hold * self.hold
        length = last - self.warmup
        progress = (time - self.warmup) / length if length > 0 else 0.0
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * progress)) / 2

    def values(self) -> list[float]:
        """Return the values at 0, 1, ... T - 1; T must be whole."""
        if self.total != int(self.total):
            raise ValueError(f"total is {self.total}; only a whole number of steps can be listed")
        return [self(time) for time in range(int(self.total))]

    def in_steps(self, steps_per_epoch: int, *, per_epoch: bool = False) -> "WarmupCosine":
        """Return the schedule with t in optimizer steps where this one has it in epochs.

        Args:
            steps_per_epoch: at least 1.
            per_epoch: after the warm-up, change only when an epoch begins.

        Raises:
            ValueError: steps_per_epoch < 1; per_epoch where W is not a whole number of epochs.
        """
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch is {steps_per_epoch}; it must be at least 1")
        if per_epoch and self.warmup != int(self.warmup):
            raise ValueError(f"warmup is {self.warmup}; a value per epoch needs whole epochs")
        return replace(
            self,
            total=self.total * steps_per_epoch,
            warmup=self.warmup * steps_per_epoch,
            hold=steps_per_epoch if per_epoch else self.hold,
        )


@dataclass(frozen=True)
class ExponentialDecay:
    """peak * rate ** floor(t / hold): a factor per epoch when t counts steps and hold an epoch's.

    Raises:
        ValueError: peak not positive; rate outside (0, 1]; hold < 1; at call, t < 0.
    """

    peak: float
    rate: float
    hold: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.peak < math.inf and 0 < self.rate <= 1 and self.hold >= 1):
            raise ValueError(
                f"peak {self.peak}, rate {self.rate}, hold {self.hold}: need peak > 0,"
                " rate in (0, 1], hold >= 1"
            )

    def __call__(self, time: float) -> float:
        """Return the value at `time`."""
        if not time >= 0:
            raise ValueError(f"the time is {time}; it counts from 0")
        return float(self.peak * self.rate ** (time // self.hold))


def cosine_to_cube(
    *, lr: float, lr_decay_rate: float, epochs: int, warmup_epochs: int = 0
) -> WarmupCosine:
    """Return a cosine over epochs from lr to lr * lr_decay_rate**3, warm-up from 0.

    The floor is the cube of the rate: HobbitLong/SupContrast, ``util.py: adjust_learning_rate``.
    Its own warm-up starts from 0.01, above LaCViT's target of 0.001, which is not reproduced.

    Raises:
        ValueError: lr not positive; lr_decay_rate outside [0, 1]; as `WarmupCosine`.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}; it must be a positive number")
    if not 0 <= lr_decay_rate <= 1:
        raise ValueError(f"lr_decay_rate is {lr_decay_rate}; it must be in [0, 1]")
    return WarmupCosine(total=epochs, peak=lr, end=lr * lr_decay_rate**3, warmup=warmup_epochs)


def warmup_steps(total_steps: int, fraction: float) -> int:
    """Return the whole steps of a warm-up that is a fraction of all steps.

    Raises:
        ValueError: total_steps < 1; fraction outside [0, 1).
    """
    if total_steps < 1 or not 0 <= fraction < 1:
        raise ValueError(
            f"total_steps {total_steps}, fraction {fraction}: need at least 1 and [0, 1)"
        )
    return int(total_steps * fraction)


def scale_learning_rate(base_lr: float, effective_batch_size: int, *, divisor: int = 256) -> float:
    """Return base_lr * effective_batch_size / divisor: the linear scaling rule (1706.02677).

    Args:
        base_lr: the rate of a batch of `divisor`.
        effective_batch_size: images per optimizer step over GPUs, accumulation and, where the
            method says so, views.
        divisor: batch size that `base_lr` is meant for.

    Raises:
        ValueError: a value that is not positive.
    """
    if not (base_lr > 0 and effective_batch_size > 0 and divisor > 0):
        raise ValueError(
            f"base_lr {base_lr}, effective_batch_size {effective_batch_size}, divisor {divisor}:"
            " each must be positive"
        )
    return base_lr * effective_batch_size / divisor
