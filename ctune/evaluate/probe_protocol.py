"""How the heads of a linear probe are trained and one of them is chosen."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ctune.evaluation_config import LinearProbeEvaluation
from ctune.schedules import WarmupCosine, cosine_to_cube, scale_learning_rate, warmup_steps

Normalization = Literal["none", "standardize", "batch_norm"]
Schedule = Literal["cosine_to_cube", "warmup_cosine", "mae_cosine", "cosine", "constant"]

LACVIT_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Around its 0.1, so wide because the scale of raw features differs between encoders."""
MAE_CT_BASE_RATES = (
    0.001, 0.003, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10,
)  # fmt: skip
MAE_CT_BATCH_SIZE = 1024
MAE_BASE_RATE, MAE_BATCH_SIZE, MAE_WARMUP_EPOCHS = 0.1, 16_384, 10


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """Training of linear heads; the defaults are LaCViT's with a grid of rates."""

    learning_rates: tuple[float, ...] = LACVIT_RATES
    epochs: int = 100
    batch_size: int = 128
    drop_last: bool = False
    """Leave out an epoch's last, smaller batch, where there is a whole one."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine_to_cube"
    """``cosine_to_cube``: per epoch, to lr times ``lr_decay_rate`` cubed; ``cosine``: per epoch, to
    0; ``warmup_cosine``: per step, from 0 to the rate to exactly 0, each of them had by a step;
    ``mae_cosine``: the same, but the warm-up ends with the step after it and no step has the 0."""
    lr_decay_rate: float = 0.2
    warmup_fraction: float = 0.1
    """Of all steps, with ``warmup_cosine`` and ``mae_cosine``."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    normalization: Normalization = "none"
    """``standardize``: centre and scale each dimension by the train set; ``batch_norm``: by each
    batch in training, by running statistics in the test. Neither has parameters."""
    norm_eps: float = 1e-5
    """Added to the variance by ``standardize`` and ``batch_norm``."""
    init_std: float = 0.02
    """Of the truncated normal start of the weights."""
    holdout_fraction: float = 0.1
    """Share of each class of the train set that chooses the rate."""
    tests_all_rates: bool = False
    """Test the heads of all rates after every epoch too, for the best of them."""
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
            "warmup_fraction": 0 <= self.warmup_fraction < 1,
            "norm_eps": self.norm_eps > 0,
            "init_std": 0 <= self.init_std < math.inf,
            "holdout_fraction": 0 < self.holdout_fraction < 1,
        }
        for name, within in bounds.items():
            if not within:
                raise ValueError(f"{name} is {getattr(self, name)}, which is out of range")

    def factor_at(self, steps_per_epoch: int) -> Callable[[int], float]:
        """Return step -> factor of every learning rate."""
        if self.schedule in ("warmup_cosine", "mae_cosine"):
            total, inclusive = self.epochs * steps_per_epoch, self.schedule == "warmup_cosine"
            return WarmupCosine(
                total,
                peak=1.0,
                warmup=warmup_steps(total, self.warmup_fraction),
                ramp="both" if inclusive else "start",
                reach_end=inclusive,
            )
        if self.schedule == "constant":
            return lambda step: 1.0
        rate = 0.0 if self.schedule == "cosine" else self.lr_decay_rate
        per_epoch = cosine_to_cube(lr=1.0, lr_decay_rate=rate, epochs=self.epochs)
        return lambda step: per_epoch(step // steps_per_epoch)


def mae_ct_protocol(*, full: bool = False, seed: int = 0) -> ProbeProtocol:
    """MAE-CT's probe: batch norm, 13 rates, batch 1024, 50 epochs of crops or 100 of the cache.

    Source: ml-jku/MAE-CT, ``PROBING.md``; the three lowest rates are added to its ten, since some
    of its optima lie at the edge. The learning rates are the base rates times 1024 / 256, also
    where the train set is smaller: its few steps would otherwise lead nowhere.

    Args:
        full: on random crops.
        seed: of batches, start and held-out part.
    """
    rates = tuple(scale_learning_rate(lr, MAE_CT_BATCH_SIZE) for lr in MAE_CT_BASE_RATES)
    return ProbeProtocol(
        learning_rates=rates,
        epochs=50 if full else 100,
        batch_size=MAE_CT_BATCH_SIZE,
        drop_last=True,
        schedule="warmup_cosine",
        normalization="batch_norm",
        init_std=0.01,
        tests_all_rates=True,
        seed=seed,
    )


def mae_protocol(*, epochs: int = 90, seed: int = 0) -> ProbeProtocol:
    """MAE's probe: batch norm, LARS at one rate, batch 16384, 10 epochs of warm-up.

    Source: arXiv 2111.06377, appendix A.1; facebookresearch/mae, ``main_linprobe.py``. The rate is
    0.1 times 16384 / 256, also where the train set is smaller, as in `mae_ct_protocol`.

    Args:
        epochs: published with 90 for ViT-B, 50 for larger ones; up to a fifth of them warm up.
        seed: of batches and start.
    """
    return ProbeProtocol(
        learning_rates=(scale_learning_rate(MAE_BASE_RATE, MAE_BATCH_SIZE),),
        epochs=epochs,
        batch_size=MAE_BATCH_SIZE,
        drop_last=True,
        schedule="mae_cosine",
        warmup_fraction=min(MAE_WARMUP_EPOCHS, epochs // 5) / epochs,
        optimizer="lars",
        normalization="batch_norm",
        norm_eps=1e-6,
        init_std=0.01,
        tests_all_rates=True,
        seed=seed,
    )


def recipe_protocol(settings: LinearProbeEvaluation, *, seed: int) -> ProbeProtocol:
    """Return the training that a run's settings of the linear probe ask for."""
    epochs = settings.num_epochs
    if settings.recipe == "mae":
        return mae_protocol(epochs=epochs, seed=seed)
    is_lacvit, full = settings.recipe == "lacvit", settings.protocol == "full"
    start = ProbeProtocol(seed=seed) if is_lacvit else mae_ct_protocol(full=full, seed=seed)
    return replace(start, epochs=epochs)
